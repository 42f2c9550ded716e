"""The metrics that ship with this package, plugins of ``distill.metrics``. Imports no torch."""
