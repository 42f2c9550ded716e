"""Where weights come from and go to: files, other weights, meta modules."""
