"""Samples a teacher and stores what its clips were on the way, for KD and ODE regression."""
