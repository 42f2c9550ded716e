"""Several processes that act as one: what one of them cannot do, none has done.

``distill_protocols.RankGroup`` is the contract.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

from attrs import frozen
from distill_protocols import DistillError, RankError
from torch import distributed
from torch.distributed import ProcessGroup

T = TypeVar("T")


@frozen(eq=False, kw_only=True)
class Ranks:
    """The processes of a run, in a group of their own, which works beside nccl and other threads.

    Attributes:
        rank: this one; 0 decides.
        size: how many there are.
        group: over gloo; None for a process alone.
        timeout: seconds after which a rank that does not answer is given up.
        error: what is raised where ranks do not act as one.
        advice: how such an error's message ends: the way out.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    timeout: float = 0.0
    error: type[DistillError] = RankError
    advice: str = ""

    @classmethod
    def of_this_run(
        cls, timeout: float, *, error: type[DistillError] = RankError, advice: str = ""
    ) -> Ranks:
        """All ranks call it together; where there is one process, it is alone.

        Args:
            timeout: seconds after which a rank that does not answer is given up.
        """
        if not distributed.is_available() or not distributed.is_initialized():
            return cls(error=error, advice=advice)
        if distributed.get_world_size() == 1:
            return cls(error=error, advice=advice)
        group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        assert isinstance(group, ProcessGroup)  # it is of all ranks, so this one is a member
        return cls(
            rank=distributed.get_rank(),
            size=distributed.get_world_size(),
            group=group,
            timeout=timeout,
            error=error,
            advice=advice,
        )

    @classmethod
    @contextlib.contextmanager
    def temporary(cls, timeout: float, *, error: type[DistillError] = RankError) -> Iterator[Ranks]:
        """Within: ``of_this_run``; its group is given back at the end."""
        ranks = cls.of_this_run(timeout, error=error)
        try:
            yield ranks
        finally:
            if ranks.group is not None:
                distributed.destroy_process_group(ranks.group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather_results(self, action: Callable[[], T]) -> list[T]:
        """Let every rank do ``action``, and return what came of it, by rank.

        ``action`` may itself wait for other ranks. If it fails on one rank before that, the others
        wait there until the timeout of the group that they wait in.

        Raises:
            DistillError: it failed on some rank: the same error on all. Where a rank's own is
                another error of the framework, that rank raises it.
        """
        if self.group is None:
            return [action()]
        value: T | None = None
        error: Exception | None = None
        try:
            value = action()
        except Exception as caught:
            error = caught
        answers: list[Any] = [None] * self.size
        self.barrier()  # a gather would know only that not all came
        with self.within_timeout():
            distributed.all_gather_object(
                answers, (_describe_error(error), value), group=self.group
            )
        failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(answers) if text]
        if failures:
            if isinstance(error, DistillError) and not isinstance(error, self.error):
                raise error
            raise self.error("; ".join(failures)) from error
        return [cast(T, value) for _, value in answers]

    def run_each(self, action: Callable[[], T]) -> T:
        """Every rank does ``action`` by itself, and keeps what comes of it.

        Raises:
            DistillError: as ``gather_results``.
        """
        kept: list[T] = []
        self.gather_results(lambda: kept.append(action()))
        return kept[0]

    def run_on_first(self, action: Callable[[], T]) -> T:
        """Rank 0 does ``action``, and all get what came of it.

        Raises:
            DistillError: it failed: the same error on all.
        """
        return self.gather_results(lambda: action() if self.is_first else cast(T, None))[0]

    def barrier(self) -> None:
        """Until all ranks are here.

        Raises:
            DistillError: some do not come. Rank 0 names them; the others refer to rank 0.
        """
        if self.group is not None:
            with self.within_timeout():
                within = timedelta(seconds=self.timeout)
                distributed.monitored_barrier(self.group, within, wait_all_ranks=True)

    def ranks_that_differ(self, value: object) -> list[int]:
        """Return the ranks whose ``value`` is not rank 0's (none: all agree); any small value."""
        values = self.gather_results(lambda: value)
        return [rank for rank, theirs in enumerate(values) if theirs != values[0]]

    @contextlib.contextmanager
    def within_timeout(self) -> Iterator[None]:
        """Around every wait for other ranks.

        Raises:
            DistillError: one of them died, or did not come within the timeout.
        """
        try:
            yield
        except RuntimeError as error:
            if self.group is None:
                raise
            raise self.error(
                f"rank {self.rank} lost the others ({str(error).splitlines()[0]}): one of them "
                f"died, or did not answer within {self.timeout:g} s. All ranks act together. Look "
                "for the first error among their logs, then start all again with "
                f"checkpoint.resume: latest{self.advice}."
            ) from error


ALONE = Ranks()
"""A process by itself."""


def _describe_error(error: Exception | None) -> str | None:
    if error is None or isinstance(error, DistillError | OSError):
        return None if error is None else str(error)
    return f"{type(error).__name__}: {error}"
