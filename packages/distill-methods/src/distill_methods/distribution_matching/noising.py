"""How a student's clips are noised for the two scores, and what the critic learns there."""

from __future__ import annotations

from typing import Protocol

from distill_protocols import Latents

from distill_methods.context import MethodContext
from distill_methods.noise_sampler import NoisedLatents
from distill_methods.rollouts import Rollout
from distill_methods.time_sampling import TimeSampling


class ClipNoising(Protocol):
    """The noise that clips of a rollout get at a random t, without gradient."""

    def add_noise(
        self, rollout: Rollout, purpose: str, iteration: int, time: TimeSampling, *roles: str
    ) -> NoisedLatents:
        """Noise each clip at a fresh t of ``time``, at which all of ``roles`` can be called; see
        ``NoiseSampler.add_noise_at_random_time``."""
        ...

    def velocity(self, rollout: Rollout, noised: NoisedLatents) -> Latents:
        """Return what the critic is trained to predict: its mean given x_t is the velocity of the
        clips' distribution."""
        ...


class ForwardNoising:
    """``x_t = (1 - s) x0 + s eps`` at any t, with the velocity ``eps - x0``."""

    def __init__(self, context: MethodContext) -> None:
        self._context = context

    def add_noise(
        self, rollout: Rollout, purpose: str, iteration: int, time: TimeSampling, *roles: str
    ) -> NoisedLatents:
        """See ``ClipNoising.add_noise``."""
        noise = self._context.noise
        return noise.add_noise_at_random_time(rollout.x0, purpose, iteration, time, *roles)

    def velocity(self, rollout: Rollout, noised: NoisedLatents) -> Latents:
        """See ``ClipNoising.velocity``."""
        return self._context.adapter.target(rollout.x0, noised.noise, noised.t, "v")
