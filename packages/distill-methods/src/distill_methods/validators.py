"""Validators of configuration values that say why a rule holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Validator = Callable[[Any, Any, Any], None]


def at_least(bound: float, why: str) -> Validator:
    """Finite and >= ``bound``; nan is neither."""

    def check(_instance: Any, _attribute: Any, value: float) -> None:
        if not (math.isfinite(value) and value >= bound):
            raise ValueError(f"{value} must be at least {bound} and finite: {why}")

    return check


def above(bound: float, why: str) -> Validator:
    """Finite and > ``bound``; nan is neither."""

    def check(_instance: Any, _attribute: Any, value: float) -> None:
        if not (math.isfinite(value) and value > bound):
            raise ValueError(f"{value} must be above {bound} and finite: {why}")

    return check


def within(low: float, high: float, why: str) -> Validator:
    """In [low, high]; nan is not."""

    def check(_instance: Any, _attribute: Any, value: float) -> None:
        if not low <= value <= high:
            raise ValueError(f"{value} must be within [{low}, {high}]: {why}")

    return check
