"""This process: its device, and how it is asked to end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import torch
from attrs import frozen


def device_type() -> str:
    """Return the accelerator that is there, or the CPU."""
    # Not `current_accelerator`: that takes a laptop's mps, on which float64 does not exist.
    return "cuda" if torch.cuda.is_available() else "cpu"


@frozen
class Worker:
    """One of the processes that make the same data set: every ``size``-th part is its own.

    They do not talk: a part is a file, and whoever finds all of them there writes the index.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of_this_process(cls) -> Worker:
        """Read its number from torchrun; one alone without it."""
        rank, size = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", "0")))

    def device(self, kind: str | None = None) -> torch.device:
        """Choose its accelerator, or the CPU.

        Args:
            kind: ``cpu`` or ``cuda``; None: what is there.
        """
        kind = device_type() if kind is None else kind
        return torch.device(kind, self.local_rank) if kind == "cuda" else torch.device(kind)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within: SIGTERM unwinds like Ctrl-C, so that ``finally`` and ``with`` blocks clean up."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
