"""Validators of configuration values that say why a rule holds. No torch here.

Each takes the reason, and the way out where there is one, as ``why``. For a value that may be
None wrap them in ``attrs.validators.optional``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Validator = Callable[[Any, Any, Any], None]


def at_least(bound: float, why: str) -> Validator:
    """Finite and >= ``bound``; nan is neither."""

    def check(_instance: Any, _attribute: Any, value: float) -> None:
        if not (math.isfinite(value) and value >= bound):
            raise ValueError(f"{value} must be at least {bound}{_and_finite(value)}: {why}")

    return check


def above(bound: float, why: str) -> Validator:
    """Finite and > ``bound``; nan is neither."""

    def check(_instance: Any, _attribute: Any, value: float) -> None:
        if not (math.isfinite(value) and value > bound):
            raise ValueError(f"{value} must be above {bound}{_and_finite(value)}: {why}")

    return check


def within(low: float, high: float, why: str) -> Validator:
    """In [low, high]; nan is not."""

    def check(_instance: Any, _attribute: Any, value: float) -> None:
        if not low <= value <= high:
            raise ValueError(f"{value} must be within [{low}, {high}]: {why}")

    return check


def _and_finite(value: float) -> str:
    return "" if math.isfinite(value) else " and finite"
