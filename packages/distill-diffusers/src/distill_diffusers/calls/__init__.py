"""One call of a transformer: conversions, guidance, precision, features, derivatives."""
