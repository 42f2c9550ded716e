"""What a run needs: how roles lie over processes, the memory that they take, what would help."""
