"""Teacher-only: regression on the teacher's guided prediction."""
