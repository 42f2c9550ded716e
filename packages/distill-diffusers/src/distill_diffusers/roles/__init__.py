"""Roles: loaded, adapted, shared, moved away, compiled."""
