"""Finding out that something is wrong: values that are not finite, ranks that are missing."""
