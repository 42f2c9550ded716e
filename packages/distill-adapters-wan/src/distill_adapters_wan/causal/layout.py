"""Which frames each chunk attends to, and at which positions. Numbers only, no torch.

Attention is computed chunk by chunk over the keys that the chunk sees, not over all keys under a
mask: a mask of a 480p clip of 21 latent frames is 32,760 x 32,760 (1.07 GB as booleans, more as a
bias), costs the full product, and rules out the fused kernels that take none.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from attrs import frozen
from distill_protocols import Chunk

from distill_adapters_wan.causal.config import CausalConfig


@frozen
class Span:
    """Key frames ``start .. stop - 1`` of a call, rotated ``shift`` positions beyond their own."""

    start: int
    stop: int
    shift: int = 0


@frozen
class Group:
    """Frames ``start .. stop - 1`` of the model's input, whose queries attend to the same keys."""

    start: int
    stop: int
    keys: tuple[Span, ...]


@frozen
class Layout:
    """One call's attention.

    Attributes:
        past: number of key frames from the cache, before those of the model's input.
        positions: temporal position of each key frame: ranges, after one another. The last ones
            are those of the queries.
        groups: all queries, in order.
    """

    past: int
    positions: tuple[range, ...]
    groups: tuple[Group, ...]

    @property
    def longest(self) -> int:
        """Number of positions that the rotary table must have."""
        return max(r.stop for r in self.positions)


@functools.lru_cache(maxsize=256)
def whole_clip(config: CausalConfig, frames: int) -> Layout:
    """Lay out block-causal attention: each chunk of a clip sees itself and its past."""
    groups = tuple(
        Group(c.first, c.stop, _joined([*_past(config, c), Span(c.first, c.stop)]))
        for c in config.chunks(frames)
    )
    return Layout(0, (range(frames),), groups)


@functools.lru_cache(maxsize=256)
def one_chunk(past: int, frames: int) -> Layout:
    """Lay out a chunk after a cached past, all of which it sees.

    Positions count within what is cached, so they do not grow with the video, and a sink stands
    right before the window.
    """
    keys = past + frames
    return Layout(past, (range(keys),), (Group(0, frames, (Span(0, keys),)),))


@functools.lru_cache(maxsize=256)
def one_chunk_in_video(past: tuple[range, ...], chunk: Chunk) -> Layout:
    """Lay out a chunk after a cached past, each frame at its position in the video.

    Args:
        past: frames of the cached chunks.
    """
    before = sum(map(len, past))
    group = Group(0, chunk.frames, (Span(0, before + chunk.frames),))
    return Layout(before, (*past, range(chunk.first, chunk.stop)), (group,))


@functools.lru_cache(maxsize=256)
def clean_past(config: CausalConfig, frames: int) -> Layout:
    """Lay out [clean; noisy]: noisy chunks see clean pasts and themselves, clean ones block-causal.

    A frame has the same position in both halves.
    """
    noisy = tuple(
        Group(frames + c.first, frames + c.stop,
              _joined([*_past(config, c), Span(frames + c.first, frames + c.stop)]))
        for c in config.chunks(frames)
    )  # fmt: skip
    positions = (range(frames), range(frames))
    return Layout(0, positions, whole_clip(config, frames).groups + noisy)


def _past(config: CausalConfig, chunk: Chunk) -> Iterator[Span]:
    sink, window = config.past(chunk.first)
    if sink:
        gap = 0
        if config.sink_positions == "moving":
            gap = (window.start if window else chunk.first) - sink.stop
        yield Span(sink.start, sink.stop, gap)
    if window:
        yield Span(window.start, window.stop)


def _joined(spans: list[Span]) -> tuple[Span, ...]:
    """Join neighbouring spans: keys of one slice need no copy."""
    joined = [spans[0]]
    for span in spans[1:]:
        last = joined[-1]
        if (last.stop, last.shift) == (span.start, span.shift):
            joined[-1] = Span(last.start, span.stop, last.shift)
        else:
            joined.append(span)
    return tuple(joined)
