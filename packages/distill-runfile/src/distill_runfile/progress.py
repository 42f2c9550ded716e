"""Lines that state the progress of a long job, and the time that is left."""

from __future__ import annotations

import logging
import time
from datetime import timedelta

from attrs import define, field

SECONDS_BETWEEN_LINES = 10.0


@define(eq=False)
class Progress:
    """Logs how much of a job is done, every now and then and at its end.

    Attributes:
        unit: what is counted, in the plural.
    """

    total: int
    unit: str
    log: logging.Logger
    done: int = 0
    began: float = field(factory=time.monotonic)
    last_line: float = field(factory=time.monotonic)

    def advance(self, count: int) -> None:
        """Count what was done, and log the count from time to time."""
        self.done += count
        now = time.monotonic()
        if not self.done or (
            now - self.last_line < SECONDS_BETWEEN_LINES and self.done < self.total
        ):
            return
        self.last_line = now
        each = (now - self.began) / self.done
        left = timedelta(seconds=round(each * (self.total - self.done)))
        self.log.info(
            "%d/%d %s, %.3g s each, %s left", self.done, self.total, self.unit, each, left
        )
