"""Decoding ahead of the VAE, in threads: PyAV lets go of Python's lock while it decodes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from attrs import frozen
from distill_media import (
    ClipShape,
    CutConfig,
    MediaClip,
    MediaError,
    MediaItem,
    PlannedClip,
    decode_clips,
    find_notes,
    group_clips,
    plan_clips,
)

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")


@frozen(eq=False)
class Decoded:
    """What came of an item: a clip, or why there is none; ``last`` of what comes of it."""

    item: MediaItem
    result: MediaClip | MediaError
    notes: tuple[str, ...]
    last: bool


@frozen(eq=False)
class _Task:
    """Clips of an item that are decoded in one pass, or why there are none."""

    item: MediaItem
    planned: list[PlannedClip] | MediaError
    last: bool


def decode_ahead(
    items: Iterable[MediaItem],
    buckets: Sequence[ClipShape],
    cut: CutConfig,
    *,
    scene_cuts: Mapping[str, Sequence[float]],
    workers: int,
    ahead: int,
) -> Generator[Decoded, None, None]:
    """Yield the clips of all items in their order, decoded up to ``ahead`` passes before.

    Whatever the number of workers, what is yielded is the same.
    """

    def plan(item: MediaItem) -> list[_Task]:
        try:
            groups = group_clips(plan_clips(item, buckets, cut, scene_cuts=scene_cuts))
        except MediaError as error:
            return [_Task(item, error, True)]
        return [_Task(item, group, group is groups[-1]) for group in groups]

    def decode(task: _Task) -> list[Decoded]:
        if isinstance(task.planned, MediaError):
            return [Decoded(task.item, task.planned, (), task.last)]
        try:
            clips = decode_clips(task.planned, cut)
        except MediaError as error:
            return [Decoded(task.item, error, (), task.last)]
        return [
            Decoded(task.item, clip, (*clip.notes, *find_notes(clip.frames)), is_last)
            for clip in clips
            for is_last in [task.last and clip is clips[-1]]
        ]

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        plans = _map_ahead(pool, plan, items, ahead)
        tasks = (task for plan in plans for task in plan)
        for results in _map_ahead(pool, decode, tasks, ahead):
            yield from results
    finally:
        pool.shutdown(cancel_futures=True)


def _map_ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[InputT], OutputT],
    inputs: Iterable[InputT],
    ahead: int,
) -> Iterator[OutputT]:
    """``map`` in a pool, in order, with at most ``ahead`` results waiting."""
    waiting: deque[Future[OutputT]] = deque()
    for value in inputs:
        waiting.append(pool.submit(function, value))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
