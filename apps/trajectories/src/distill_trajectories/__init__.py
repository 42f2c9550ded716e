"""Samples a teacher and stores trajectories from noise to clip, for KD and ODE regression."""
