"""Phased DMD: a student of two experts, each matched in its own range of noise levels."""
