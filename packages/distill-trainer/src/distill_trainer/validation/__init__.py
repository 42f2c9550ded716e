"""What is looked at and measured while a run trains, without changing it."""
