"""Checks of a model family, each a function of an ``AdapterCase``.

A check raises ``ConformanceError`` where a rule of the contract is broken, and ``NotApplicable``
where the family does not claim what it asks for. Each docstring states what breaks if it fails.
"""
