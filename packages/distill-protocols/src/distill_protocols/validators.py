"""Validators of configuration values that say why a rule holds. No torch here.

Each takes the reason, and the way out where there is one, as ``why``. For a value that may be
None wrap them in ``attrs.validators.optional``.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable
from typing import Any

from attrs import frozen

Validator = Callable[[Any, Any, Any], None]


@frozen
class NumberRule:
    """A validator of a number that documentation can read, too.

    Attributes:
        rule: what the number must be, such as ``at least 1``.
        why: the reason, and the way out where there is one.
        holds: whether a number keeps the rule.
        finite: say in the message that inf and nan are refused.
    """

    rule: str
    why: str
    holds: Callable[[float], bool]
    finite: bool = True

    def __call__(self, _instance: Any, _attribute: Any, value: float) -> None:
        if not self.holds(value):
            finite = " and finite" if self.finite and not math.isfinite(value) else ""
            raise ValueError(f"{value} must be {self.rule}{finite}: {self.why}")


def at_least(bound: float, why: str) -> NumberRule:
    """Finite and >= ``bound``; nan is neither."""
    return NumberRule(f"at least {bound}", why, lambda v: math.isfinite(v) and v >= bound)


def above(bound: float, why: str) -> NumberRule:
    """Finite and > ``bound``; nan is neither."""
    return NumberRule(f"above {bound}", why, lambda v: math.isfinite(v) and v > bound)


def within(low: float, high: float, why: str) -> NumberRule:
    """In [low, high]; nan is not."""
    return NumberRule(f"within [{low}, {high}]", why, lambda v: low <= v <= high, finite=False)


LONGEST_NAME = 200
"""Bytes of a name in UTF-8. File systems take 255, and what is written under a temporary name, or
as several files, gets some more."""


def file_name_problem(name: str) -> str | None:
    """Say why ``name`` cannot be that of a file or folder which a run makes; None: it can."""
    size = len(name.encode("utf-8", "surrogatepass"))
    if size > LONGEST_NAME:
        return (
            f"{name[:20]!r} ... is {size} bytes long and must have at most {LONGEST_NAME}: a file "
            "is called so, and file systems end at 255"
        )
    if has_control_characters(name):
        return f"{name!r} must hold no control characters: a file is called so"
    if not name or set(name) & set("/\\") or name[0] == ".":
        return f"{name!r} must be usable as a file name: no slash, and no dot at its beginning"
    return None


def has_control_characters(text: str) -> bool:
    """Tell whether ``text`` holds NUL, a line break, or what else steers a terminal."""
    return any(unicodedata.category(character) == "Cc" for character in text)
