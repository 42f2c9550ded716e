"""Which frames of a video make a clip: times, rates, windows. Numbers alone."""

from __future__ import annotations

import bisect
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Literal

from attrs import frozen

from distill_media.config import CutConfig

_SLACK = 1e-3
"""Of a frame's duration: time stamps are rounded to the container's clock."""


@frozen
class Timeline:
    """When the frames of a video are shown.

    Attributes:
        times: seconds from the first frame, rising.
        duration: seconds until the last frame is gone.
    """

    times: tuple[float, ...]
    duration: float

    @property
    def rate(self) -> float:
        """Frames a second, on average."""
        return len(self.times) / self.duration

    def nearest(self, time: float) -> int:
        """Find the frame that is nearest to ``time``; of two the earlier one.

        Nearest and not the one that is shown then: stamps that a container has rounded up would
        show every other frame twice.
        """
        after = bisect.bisect_left(self.times, time)
        if after == 0:
            return 0
        if after == len(self.times):
            return after - 1
        early, late = self.times[after - 1], self.times[after]
        return after - 1 if time - early <= late - time + 1e-9 else after


@frozen
class Scene:
    """A part of a video that clips are cut from: times in seconds, [start, end)."""

    start: float
    end: float


def split_scenes(
    duration: float, segment: tuple[float, float] | None, cuts: Sequence[float]
) -> list[Scene]:
    """Divide a video (or ``segment`` of it) at ``cuts``; what is empty is left out."""
    start, end = segment or (0.0, duration)
    start, end = max(0.0, start), min(duration, end)
    inner = sorted(cut for cut in set(cuts) if start < cut < end)
    edges = [start, *inner, end]
    return [Scene(a, b) for a, b in itertools.pairwise(edges) if b > a]


def find_gaps(timeline: Timeline) -> list[float]:
    """List the moments after which no frame is shown for a second or more, far longer than usual.

    There a file is damaged or a recording was paused: a clip over it would jump.
    """
    steps = [late - early for early, late in itertools.pairwise(timeline.times)]
    if not steps:
        return []
    longest = max(1.0, 10 * statistics.median(steps))
    return [timeline.times[n + 1] for n, step in enumerate(steps) if step >= longest]


def frames_in(scene: Scene, timeline: Timeline, fps: float | Literal["keep"] | None) -> int:
    """Count the frames that ``scene`` gives at ``fps``."""
    first, last = _span(scene, timeline)
    if fps == "keep" or fps is None:
        return last - first
    # As long as the scene lasts, and as long as there is a frame of its own to show.
    lasting = int((scene.end - scene.start) * fps + _SLACK)
    begun = int(max(0.0, timeline.times[last - 1] - scene.start) * fps + _SLACK) + 1
    return max(lasting, begun)


def starts(available: int, length: int, cut: CutConfig) -> list[int]:
    """Choose at which frames clips of ``length`` begin, of ``available`` ones at the rate."""
    last = available - length
    if last < 0:
        return []
    if cut.take == "head":
        return [0]
    if cut.take == "uniform":
        count = min(cut.count or 1, last + 1)
        return [round(i * last / (count - 1)) if count > 1 else last // 2 for i in range(count)]
    return list(range(0, last + 1, cut.stride or length))[: cut.count]


def frame_numbers(
    scene: Scene, timeline: Timeline, fps: float | Literal["keep"] | None, start: int, length: int
) -> list[int]:
    """Number the video's frames that make a clip: ``length`` at ``fps`` from the ``start``-th."""
    first, last = _span(scene, timeline)
    if fps == "keep" or fps is None:
        return list(range(first + start, first + start + length))
    times: Iterator[float] = (scene.start + (start + k) / fps for k in range(length))
    return [min(max(timeline.nearest(time), first), last - 1) for time in times]


def _span(scene: Scene, timeline: Timeline) -> tuple[int, int]:
    """Number the frames that begin within ``scene``, [first, last); the one that is shown all
    through it where none begins."""
    slack = _SLACK * timeline.duration / len(timeline.times)
    first = bisect.bisect_left(timeline.times, scene.start - slack)
    last = bisect.bisect_left(timeline.times, scene.end - slack)
    return (first, last) if last > first else (max(0, first - 1), max(1, first))
