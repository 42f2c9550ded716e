"""The Stable Diffusion 3 family: SD 3 medium, SD 3.5 medium and SD 3.5 large."""
