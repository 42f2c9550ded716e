"""All random numbers of a method: noise levels, noise, and choices that steer its calls."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from distill_protocols import (
    Batch,
    Chunk,
    CleanPast,
    ContractError,
    Latents,
    LatentsT,
    RandomStreams,
    RowGenerators,
    draw_noise,
    map_latents,
)
from torch import Tensor

from distill_methods.contracts import LatentDiffusion, expert_ranges_of
from distill_methods.exits import ExitSteps
from distill_methods.maths import (
    repeat_per_frame,
    sample_timesteps,
    sample_timesteps_within,
    standard_noise,
)
from distill_methods.time_sampling import MAX_T, TimeRange, TimeSampling, probability_within


class NoisedLatents(NamedTuple):
    """``x_t = (1 - s) x0 + s noise``; x_t and noise [B, C, T, H, W], t [B] or [B, T]."""

    x_t: Latents
    noise: Latents
    t: Tensor


class NoiseSampler:
    """Draws t, noise and choices, each from the random stream of its own ``purpose``.

    Equal purposes share a stream. What a sample gets depends on the seed, the purpose and the
    sample's place in the run, and on nothing else: one large batch, micro batches and several ranks
    see the same numbers.
    """

    def __init__(self, adapter: LatentDiffusion, streams: RandomStreams) -> None:
        self._adapter = adapter
        self.streams = streams

    def add_noise_at_random_time(
        self,
        x0: Latents,
        purpose: str,
        iteration: int,
        time: TimeSampling,
        *roles: str,
        chunks: Sequence[Chunk] = (),
    ) -> NoisedLatents:
        """Noise each clip of ``x0`` [B, C, T, H, W] at a fresh t with fresh noise.

        Args:
            purpose: of the two random streams, ``<purpose>.t`` and ``<purpose>.noise``.
            iteration: decides, with the seed, which expert's range of t is meant.
            time: the distribution of t.
            roles: those that will be called at t; see ``sample_timesteps``.
            chunks: with a t for each of them.
        """
        t = self.sample_timesteps(
            f"{purpose}.t", len(x0), iteration, time, *roles, chunks=chunks
        ).to(x0.device)
        noise = self.noise_like(x0, f"{purpose}.noise")
        return NoisedLatents(self._adapter.add_noise(x0, noise, t), noise, t)

    def clean_past(
        self, x0: Tensor, purpose: str, context_noise: float, *, t_max: float | None = None
    ) -> CleanPast:
        """Return clips ``x0`` [B, C, T, H, W] as what chunks see before them (teacher forcing).

        Args:
            purpose: of the random streams, ``<purpose>.t`` and ``purpose`` itself for the noise.
            context_noise: t that they are noised to, as in sampling; 0: not at all.
            t_max: t is drawn for each clip, uniform between ``context_noise`` and this; None: it
                is ``context_noise``.
        """
        if context_noise == 0 and t_max is None:
            return CleanPast(latents=x0)
        t = torch.full((len(x0),), context_noise, device=x0.device)
        if t_max is not None:
            u = self.streams.rows(f"{purpose}.t", len(x0)).uniform().to(x0.device)
            t = context_noise + (t_max - context_noise) * u
        noise = self.noise_like(x0, purpose)
        return CleanPast(latents=self._adapter.add_noise(x0, noise, t), t=t)

    def sample_timesteps(
        self,
        purpose: str,
        count: int,
        iteration: int,
        time: TimeSampling,
        *roles: str,
        chunks: Sequence[Chunk] = (),
    ) -> Tensor:
        """Draw t of ``count`` samples at which all of ``roles`` can be called, fp32.

        Where a role has several experts, all of them lie in one expert's range of t
        (``sample_range``); over the iterations they have the distribution of ``time``.

        Returns:
            [B], or with ``chunks`` an independent t for each of them, [B, T].
        """
        time_range = self.sample_range(
            purpose, iteration, lambda r: probability_within(time, *r), *roles
        )
        rows, shape = self.streams.rows(purpose, count), (len(chunks),) if chunks else ()
        if time_range is None:
            t = sample_timesteps(time, rows, shape)
        else:
            t = sample_timesteps_within(rows.uniform(shape), time, time_range)
        return repeat_per_frame(t, [chunk.frames for chunk in chunks]) if chunks else t

    def sample_range(
        self,
        purpose: str,
        iteration: int,
        probability: Callable[[TimeRange], float],
        *roles: str,
    ) -> TimeRange | None:
        """Draw the range of t in which ``iteration`` calls ``roles``; None where any t will do.

        A call has one expert, and a sharded expert is gathered by all ranks at once: if ranks or
        micro batches chose different experts, the ranks would wait for each other for ever, and
        an expert would step on a part of the batch. Hence one range an iteration.

        Args:
            probability: of each range that experts divide t into. Where a role has one expert of
                several, there are none of the others, and t has its distribution within these.

        Raises:
            ContractError: all of ``roles`` can be called at no t of a probability above 0.
        """
        ranges = expert_ranges_of(self._adapter, *roles)
        if ranges == ((0.0, MAX_T),):
            return None
        probabilities = [probability(r) for r in ranges]
        total = sum(probabilities)
        if not total > 0:
            raise ContractError(
                f"{', '.join(roles)} can be called at t in {list(ranges)} (each has the experts "
                "for these), and no t of these is ever drawn. Give the roles the same experts, and "
                "the method times at which they are called"
            )
        probabilities = [p / total for p in probabilities]
        return ranges[self.sample_index(f"{purpose}.range", iteration, probabilities)]

    def sample_index(self, purpose: str, iteration: int, probabilities: Sequence[float]) -> int:
        """Draw an index with ``probabilities`` (which add up to 1), the same on all ranks and in
        all micro batches: a function of (seed, purpose, iteration) alone."""
        u = float(RowGenerators.seeded(self.streams.seed, purpose, [iteration]).uniform())
        return _index_of(u, probabilities)

    def sample_shared_integer(self, purpose: str, high: int) -> int:
        """Draw a uniform integer in 0 .. high - 1, the same on all ranks: for choices that decide
        which calls are made, as all ranks must make the same calls of a sharded model. The stream
        moves on with each call, once a micro step, unlike that of ``sample_index``."""
        generator = self.streams.get(purpose, shared=True)
        return int(torch.randint(high, (), generator=generator))

    def sample_shared_exit(self, purpose: str, exits: ExitSteps) -> int:
        """Draw one of ``exits``, the same on all ranks; see ``sample_shared_integer``."""
        steps, weights = exits
        if len(set(weights)) == 1:
            return steps[self.sample_shared_integer(purpose, len(steps))]
        u = float(torch.rand((), generator=self.streams.get(purpose, shared=True)))
        return steps[_index_of(u, [weight / sum(weights) for weight in weights])]

    def sample_exits(
        self, purpose: str, count: int, exits: ExitSteps, shape: tuple[int, ...] = ()
    ) -> Tensor:
        """Draw one of ``exits`` for each of ``count`` samples: int64 [count, *shape]."""
        rows = self.streams.rows(purpose, count)
        if len(set(exits.weights)) == 1:
            indices = rows.integers(len(exits.steps), shape)
        else:
            u = rows.uniform(shape).double()
            weights = torch.tensor(exits.weights, device=u.device, dtype=u.dtype)
            indices = torch.searchsorted(weights.cumsum(0) / weights.sum(), u, right=True)
            indices = indices.clamp(max=_last_above_zero(exits.weights))
        return torch.tensor(exits.steps, device=indices.device)[indices]

    def clip_noise(self, batch: Batch, purpose: str) -> Latents:
        """Draw the noise that the clips of ``batch`` can begin with, [B, C, T, H, W]."""
        rows = self.streams.rows(purpose, len(batch))
        noise = draw_noise(self._adapter, batch.latent_shape, rows)
        return map_latents(lambda tensor: tensor.to(batch.device), noise)

    def noise_like(self, latents: LatentsT, purpose: str) -> LatentsT:
        """Draw standard normal noise, fp32, like ``latents`` [B, C, T, H, W]."""
        rows = self.streams.rows(purpose, len(latents))
        return map_latents(
            lambda tensor: standard_noise(tensor.shape[1:], rows, tensor.device), latents
        )


def _index_of(u: float, probabilities: Sequence[float]) -> int:
    """Invert the distribution function of ``probabilities`` at ``u`` in [0, 1)."""
    # Rounding may leave its last value below u; what has no probability is never drawn.
    index = bisect.bisect_right(list(itertools.accumulate(probabilities)), u)
    return min(index, _last_above_zero(probabilities))


def _last_above_zero(weights: Sequence[float]) -> int:
    return max(index for index, weight in enumerate(weights) if weight > 0)
