"""Causal consistency: a causal student learns where its causal teacher's trajectories end."""
