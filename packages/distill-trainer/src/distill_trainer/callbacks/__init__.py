"""Callbacks. Their config classes are in ``configs``, without torch."""
