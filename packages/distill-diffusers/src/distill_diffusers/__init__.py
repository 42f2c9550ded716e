"""What every model family on diffusers needs."""
