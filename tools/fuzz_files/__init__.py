"""Damage to every kind of file that is read: errors of our own tree, no hang, no silent change."""
