"""Batches without end, from anything that can be iterated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from distill_protocols import BatchLoader, DataError


class RestartingLoader:
    """A plain iterable as a ``BatchLoader``: started again whenever it runs out.

    Its position is the number of batches given out. To resume, as many are read and dropped, so
    the resumed order is the same only where the iterable's own order is fixed.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._given = 0
        self._skip = 0

    def __iter__(self) -> Iterator[Any]:
        while True:
            empty = True
            for batch in self._batches:
                empty = False
                if self._skip:
                    self._skip -= 1
                    continue
                self._given += 1
                yield batch
            if empty:
                raise DataError(
                    f"the loader yielded {self._given} batches and then none when it was started "
                    "again; training needs batches until its last iteration. An empty data set "
                    "or a generator, which can be read once only, does this: give a list, a "
                    "DataLoader, or another iterable that starts afresh each time."
                )

    def state_dict(self) -> dict[str, Any]:
        """``{"batches": n}``."""
        return {"batches": self._given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue behind the n-th batch."""
        self._given = self._skip = int(state["batches"])


def endless(loader: Iterable[Any]) -> BatchLoader:
    """``loader`` itself where it can save its position, else wrapped so that it can."""
    return loader if isinstance(loader, BatchLoader) else RestartingLoader(loader)
