"""Sampling: from noise to clean latents, and the stock scheduler that repeats it."""
