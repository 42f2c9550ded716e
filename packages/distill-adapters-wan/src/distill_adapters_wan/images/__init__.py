"""A first frame as a condition."""
