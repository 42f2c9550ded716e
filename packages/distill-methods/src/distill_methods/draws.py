"""What the steps draw, of a model with experts and pictures as of one without."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from distill_protocols import Chunk, Condition, RandomStreams, RowGenerators
from torch import Tensor

from distill_methods.contracts import LatentDiffusion
from distill_methods.maths import noise_like, per_frame, sample_timesteps, timesteps_within
from distill_methods.time_ranges import TOP, Range, share
from distill_methods.time_sampling import TimeSampling


class Noised(NamedTuple):
    """``x_t = (1 - s) x0 + s noise``; x_t and noise [B, C, T, H, W], t [B] or [B, T]."""

    x_t: Tensor
    noise: Tensor
    t: Tensor


class Draws:
    """Times, noises and choices of a method, each from a stream of its own purpose."""

    def __init__(self, adapter: LatentDiffusion, streams: RandomStreams) -> None:
        self._adapter = adapter
        self.streams = streams

    def times(
        self,
        purpose: str,
        count: int,
        iteration: int,
        time: TimeSampling,
        *roles: str,
        chunks: Sequence[Chunk] = (),
    ) -> Tensor:
        """t of a micro batch that all of ``roles`` can be called with: fp32 [B], or with
        ``chunks`` an independent one for each of them, [B, T].

        Of a model with experts they lie in one range of t, the same for all micro batches and all
        ranks of an iteration; over the iterations they have the distribution of ``time``.
        """
        within = self.range_of(purpose, iteration, lambda r: share(time, *r), *roles)
        rows, each = self.streams.rows(purpose, count), (len(chunks),) if chunks else ()
        if within is None:
            t = sample_timesteps(time, rows, each)
        else:
            t = timesteps_within(rows.uniform(each), time, within)
        return per_frame(t, [chunk.frames for chunk in chunks]) if chunks else t

    def range_of(
        self, purpose: str, iteration: int, share_of: Callable[[Range], float], *roles: str
    ) -> Range | None:
        """The range of t within which ``iteration`` calls ``roles``; None where any t will do.

        Drawn with the shares as chances. It is a function of (seed, purpose, iteration) alone: the
        experts that are called must be the same on all ranks, and in all micro batches, so that
        one expert gets the gradient of the whole batch.
        """
        ranges = self.expert_ranges(*roles)
        if len(ranges) == 1:
            return None
        return ranges[self.class_of(f"{purpose}.range", iteration, [share_of(r) for r in ranges])]

    def class_of(self, purpose: str, iteration: int, shares: Sequence[float]) -> int:
        """An index, drawn with ``shares`` (which add up to 1) as chances: a function of (seed,
        purpose, iteration) alone."""
        drawn = RowGenerators.seeded(self.streams.seed, purpose, [iteration]).uniform()
        found = bisect.bisect_right(list(itertools.accumulate(shares)), float(drawn))
        return min(found, len(shares) - 1)

    def expert_ranges(self, *roles: str) -> tuple[Range, ...]:
        """See ``ExpertRouting``; a single range of an adapter that knows no experts."""
        if self._adapter.experts is None:
            return ((0.0, TOP),)
        return self._adapter.experts.expert_ranges(*roles)

    def noised(
        self,
        x0: Tensor,
        purpose: str,
        iteration: int,
        time: TimeSampling,
        *roles: str,
        chunks: Sequence[Chunk] = (),
    ) -> Noised:
        """Clips at a fresh t per sample (see ``times``), at which ``roles`` can be called: (x_t,
        noise, t)."""
        t = self.times(f"{purpose}.t", len(x0), iteration, time, *roles, chunks=chunks)
        t = t.to(x0.device)
        noise = self.noise_like(x0, f"{purpose}.noise")
        return Noised(self._adapter.add_noise(x0, noise, t), noise, t)

    def noise_like(self, latents: Tensor, purpose: str) -> Tensor:
        """Standard normal noise, fp32, like ``latents``; a sample's from its own row."""
        return noise_like(latents, self.streams.rows(purpose, len(latents)))

    def shared_integer(self, purpose: str, high: int) -> int:
        """Uniform in 0 .. high - 1, alike on all ranks: what steers which calls are made."""
        generator = self.streams.get(purpose, shared=True)
        return int(torch.randint(high, (), generator=generator))

    def guidance(self, role: str, t: Tensor, guidances: tuple[float, float]) -> float:
        """Of w at high noise levels and w at low ones, that of the expert that ``t`` goes to."""
        high, low = guidances
        ranges = self.expert_ranges(role)
        if high == low or len(ranges) == 1:
            return high
        return high if float(t.flatten()[0]) >= ranges[-1][0] else low

    def trained_frames(self, cond: Condition) -> Tensor | None:
        """See ``ImageConditioning``; None where everything is predicted."""
        if self._adapter.images is None:
            return None
        return self._adapter.images.trained_frames(cond)
