"""One role out of a checkpoint, in a format that other tools read."""
