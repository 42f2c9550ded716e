"""Configuration of the ``page`` callback. Imports no torch."""

from __future__ import annotations

from attrs import field, frozen
from distill_protocols.validators import at_least


@frozen(kw_only=True)
class PageConfig:
    """``report.html`` in the output folder: what was run, how it goes and what came of it.

    It is written after each validation and each report, at the end, and if the run fails. On by
    default; ``page: null`` leaves it out.

    Attributes:
        every_steps: also after every so many iterations; 0: only then.
    """

    every_steps: int = field(
        default=500,
        validator=at_least(0, "it is an interval; 0 leaves the page to validations and the end"),
    )
