"""The app that joins a family, a method and the trainer from one YAML file."""
