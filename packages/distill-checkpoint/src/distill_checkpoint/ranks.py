"""Several processes that act as one: what one of them cannot do, none has done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar, cast

from attrs import frozen
from distill_protocols import CheckpointError, DistillError
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
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    timeout: float = 0.0

    @classmethod
    def of_this_run(cls, timeout: float) -> Ranks:
        """All ranks call it together.

        Args:
            timeout: seconds after which a rank that does not answer is given up.
        """
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return cls()
        group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        assert isinstance(group, ProcessGroup)  # it is of all ranks, so this one is a member
        return cls(
            rank=distributed.get_rank(),
            size=distributed.get_world_size(),
            group=group,
            timeout=timeout,
        )

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, action: Callable[[], T]) -> list[T]:
        """Every rank does ``action``; what came of it, by rank.

        Raises:
            CheckpointError: it failed on some rank: the same error on all. Where a rank's own is
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
        told: list[Any] = [None] * self.size
        with self.in_time():
            distributed.all_gather_object(told, (_said(error), value), group=self.group)
        failures = [f"rank {rank}: {said}" for rank, (said, _) in enumerate(told) if said]
        if failures:
            if isinstance(error, DistillError) and not isinstance(error, CheckpointError):
                raise error
            raise CheckpointError("; ".join(failures)) from error
        return [cast(T, value) for _, value in told]

    def decide(self, action: Callable[[], T]) -> T:
        """Rank 0 does ``action``, and all get what came of it.

        Raises:
            CheckpointError: it failed: the same error on all.
        """
        return self.agree(lambda: action() if self.first else cast(T, None))[0]

    @contextlib.contextmanager
    def in_time(self) -> Iterator[None]:
        """Around every wait for other ranks.

        Raises:
            CheckpointError: one of them died, or did not come within the timeout.
        """
        try:
            yield
        except RuntimeError as error:
            if self.group is None:
                raise
            raise CheckpointError(
                f"rank {self.rank} lost the others ({str(error).splitlines()[0]}): one of them "
                f"died, or did not answer within {self.timeout:g} s. All ranks save and resume "
                "together. Look for the first error among their logs, then start all again with "
                "checkpoint.resume: latest; for slow storage, raise checkpoint.timeout_seconds."
            ) from error


ALONE = Ranks()
"""A process by itself."""


def _said(error: Exception | None) -> str | None:
    if error is None or isinstance(error, DistillError | OSError):
        return None if error is None else str(error)
    return f"{type(error).__name__}: {error}"
