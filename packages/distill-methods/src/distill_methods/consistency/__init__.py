"""Consistency distillation: one call predicts where the teacher's trajectory ends."""
