"""The training loop: one trainer, one iteration at a time."""
