"""How long the loop waits for its data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any


class TimedIterator:
    """``batches``, and the seconds spent waiting for them."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self._seconds = 0.0

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self._batches)
        self._seconds += time.perf_counter() - start
        return batch

    def take_seconds(self) -> float:
        """Seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
