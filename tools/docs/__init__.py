"""The documentation site: what is generated of the code, and how the site is built."""
