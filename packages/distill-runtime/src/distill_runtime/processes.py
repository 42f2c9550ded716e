"""This process: its device, and how it is asked to end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import torch


def device_type() -> str:
    """The accelerator that is there, or the CPU."""
    # Not `current_accelerator`: that takes a laptop's mps, on which float64 does not exist.
    return "cuda" if torch.cuda.is_available() else "cpu"


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
