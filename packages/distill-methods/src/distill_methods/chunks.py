"""Where the chunks of a causal student end. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Callable

from distill_protocols import Chunk

Divide = Callable[[int], tuple[Chunk, ...]]
"""Divides a video of a number of latent frames into the student's chunks."""


def ends_of_chunks(divide: Divide, frames: int) -> list[int]:
    """Return where whole chunks end within ``frames``."""
    ends = [chunk.stop for chunk in divide(frames)]
    # The last chunk of a video of `frames` may be cut short: a longer video then has a chunk that
    # goes on beyond it, and none ends there.
    if divide(frames + 1)[len(ends) - 1].stop > frames:
        ends.pop()
    return ends
