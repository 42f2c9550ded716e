"""KD: regression on the ends of a teacher's stored ODE trajectories."""
