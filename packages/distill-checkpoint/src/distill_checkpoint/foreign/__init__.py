"""Checkpoints of other frameworks, read without unpickling, and turned into ours."""
