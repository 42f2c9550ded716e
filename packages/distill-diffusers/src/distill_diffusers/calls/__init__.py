"""One call of a transformer: conversions, precision, hidden states of blocks, derivatives."""
