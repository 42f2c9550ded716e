"""Makes the page of a run, or of several runs to compare them."""
