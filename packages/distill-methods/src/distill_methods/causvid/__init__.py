"""CausVid: distribution matching of a causal student on noised data."""
