"""Checks of a method, each a function of a ``MethodCase``.

A check raises ``ConformanceError`` where a rule is broken, and ``NotApplicable`` where the method
does not do what it asks for. Each docstring states what breaks if it fails.
"""
