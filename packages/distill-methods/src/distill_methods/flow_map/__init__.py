"""Flow maps: one student for any number of steps."""
