"""What things cost; see ``__main__``."""
