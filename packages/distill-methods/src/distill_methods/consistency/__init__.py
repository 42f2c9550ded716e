"""Consistency distillation: one call gives what the teacher's trajectory ends at."""
