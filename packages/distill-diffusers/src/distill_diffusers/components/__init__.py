"""VAE and encoders of a pipeline folder, loaded while they are needed."""
