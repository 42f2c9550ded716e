"""A role written where other tools read it, and read back."""
