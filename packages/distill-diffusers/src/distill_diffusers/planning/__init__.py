"""Sizes and memory of models that need not exist."""
