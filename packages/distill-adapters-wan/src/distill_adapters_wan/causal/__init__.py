"""Causal roles: block-causal attention and key/value caches on Wan's own transformer."""
