"""The error of a single clip, picture or line of a table. No heavy import here."""

from __future__ import annotations

from distill_protocols import DataError


class MediaError(DataError):
    """One item cannot be used; the others can.

    Attributes:
        reason: in plain words, without the item's name: what was found, the rule, the way out.
    """

    def __init__(self, item: str, reason: str) -> None:
        self.item = item
        self.reason = reason
        super().__init__(f"{item}: {reason}")
