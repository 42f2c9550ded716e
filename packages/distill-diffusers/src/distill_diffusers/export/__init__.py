"""Export: one role written where other tools read it, and read back by them."""
