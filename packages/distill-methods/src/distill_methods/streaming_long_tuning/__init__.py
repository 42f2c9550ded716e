"""Streaming long tuning: distribution matching of the newest window of a long video."""
