"""Which checkpoints may go."""

from __future__ import annotations

from collections.abc import Collection


def superseded(
    iterations: Collection[int], *, keep_last: int, keep_every: int | None
) -> tuple[int, ...]:
    """Of whole checkpoints at ``iterations``: those to delete, the oldest first.

    The newest ``keep_last`` (at least 1) stay, and multiples of ``keep_every``.
    """
    older = sorted(iterations)[:-keep_last]
    return tuple(i for i in older if keep_every is None or i % keep_every)
