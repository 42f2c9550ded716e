"""Frozen teachers, one or several: which there are, and their weighted, guided prediction."""
