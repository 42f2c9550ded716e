"""VAE and encoders of a pipeline folder."""
