"""Batches without end, from anything that can be iterated, and the time spent waiting for them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TypedDict, cast

from distill_protocols import BatchLoader, DataError


class _Position(TypedDict):
    batches: int


class RestartingLoader:
    """A plain iterable as a ``BatchLoader``: it is started again whenever it runs out.

    Its position is the number of batches yielded. A resume reads as many and drops them, so
    the resumed order is the same only where the iterable's own order is fixed.
    """

    def __init__(self, batches: Iterable[object]) -> None:
        self._batches = batches
        self._yielded = 0
        self._skip = 0

    def __iter__(self) -> Iterator[object]:
        while True:
            empty = True
            for batch in self._batches:
                empty = False
                if self._skip:
                    self._skip -= 1
                    continue
                self._yielded += 1
                yield batch
            if empty:
                raise DataError(
                    f"the loader yielded {self._yielded} batches and then none when it was started "
                    "again; training needs batches until its last iteration. An empty data set "
                    "or a generator, which can be read once only, does this: give a list, a "
                    "DataLoader, or another iterable that starts afresh each time."
                )

    def state_dict(self) -> dict[str, object]:
        """Return ``{"batches": n}``."""
        return {"batches": self._yielded}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue behind the n-th batch."""
        self._yielded = self._skip = int(cast(_Position, state)["batches"])


def make_resumable(loader: Iterable[object]) -> BatchLoader:
    """Return ``loader`` itself where it can save its position, else in a ``RestartingLoader``."""
    return loader if isinstance(loader, BatchLoader) else RestartingLoader(loader)


class TimedIterator:
    """An iterator that adds up the seconds spent waiting for its batches."""

    def __init__(self, batches: Iterator[object]) -> None:
        self._batches = batches
        self._seconds = 0.0

    def __next__(self) -> object:
        start = time.perf_counter()
        batch = next(self._batches)
        self._seconds += time.perf_counter() - start
        return batch

    def reset_seconds(self) -> float:
        """Return the seconds waited since the last call, and count from 0 again."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
