"""Several processes that act as one: the contract."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from torch.distributed import ProcessGroup

T = TypeVar("T")


class RankGroup(Protocol):
    """The processes of a run. What one of them cannot do, none has done.

    All ranks make the same calls in the same order.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def group(self) -> ProcessGroup | None:
        """Over gloo; None for a process alone."""
        ...

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which decides and writes."""
        ...

    def gather_results(self, action: Callable[[], T]) -> list[T]:
        """Every rank does ``action``; the results by rank.

        Raises:
            DistillError: it failed on some rank: the same error on all.
        """
        ...

    def run_each(self, action: Callable[[], T]) -> T:
        """Every rank does ``action`` by itself, and keeps its own result.

        Raises:
            DistillError: as ``gather_results``.
        """
        ...

    def run_on_first(self, action: Callable[[], T]) -> T:
        """Rank 0 does ``action``, and all get its result.

        Raises:
            DistillError: it failed: the same error on all.
        """
        ...

    def barrier(self) -> None:
        """Wait until all ranks are here.

        Raises:
            DistillError: some do not come. Rank 0 names them; the others refer to rank 0.
        """
        ...

    def ranks_that_differ(self, value: object) -> list[int]:
        """Return the ranks whose ``value`` (small, picklable) is not rank 0's; empty: all agree."""
        ...

    def within_timeout(self) -> AbstractContextManager[None]:
        """Around every wait for other ranks.

        Raises:
            DistillError: one of them died, or did not come within the timeout.
        """
        ...
