"""Checkpoints of other frameworks into ours."""
