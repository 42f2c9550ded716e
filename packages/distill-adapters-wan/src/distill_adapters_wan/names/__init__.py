"""Names of Wan's weights in other codes."""
