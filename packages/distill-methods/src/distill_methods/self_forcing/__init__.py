"""Self-Forcing: distribution matching of what a causal student makes of its own past."""
