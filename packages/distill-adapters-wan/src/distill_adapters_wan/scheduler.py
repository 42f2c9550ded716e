"""The stock scheduler that repeats a SamplerSpec inside ``WanPipeline.__call__``.

``__call__`` takes a number of steps and nothing else about time, so the timesteps must follow from
the scheduler's own configuration. diffusers' FlowMatchEulerDiscreteScheduler makes them so, with
shift k, N steps and sigma_min = S_k(1/1000):

    u_i = linspace(1, sigma_min, N);  s_i = S_k(u_i);  1 - s_i is then scaled so that the last s_i
    is ``shift_terminal``.

Written out, ``1 - s_i = A i / (1 - B i)``, with A free through ``shift_terminal`` and B through k.
A grid ``S_m(1 - i/N)`` has just this form, so every SamplerSpec with a shift is met exactly; two
timesteps are met by ``shift_terminal`` alone, three by both (within k's reach), and four or more
freely chosen ones as nearly as a single k allows. The first is always 1000. B rises with k up to
k = 31.6 and falls beyond (sigma_min rises as well), so k is sought below: m up to about 20 is met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from attrs import frozen
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from distill_protocols import SamplerSpec, shift_sigma

_LOG_LOW, _LOG_HIGH = math.log(1e-3), math.log(math.sqrt(1e3))
_GRID = 300


@frozen(kw_only=True)
class StockSchedule:
    """A scheduler configuration and how near it comes.

    Attributes:
        config: arguments of FlowMatchEulerDiscreteScheduler.
        timesteps: t of each step as the scheduler makes them.
        deviation: largest |t - wanted t|, in units of t (0 to 1000).
    """

    config: dict[str, Any]
    timesteps: tuple[float, ...]
    deviation: float

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler itself."""
        return FlowMatchEulerDiscreteScheduler(**self.config)


def stock_schedule(spec: SamplerSpec) -> StockSchedule:
    """The configuration whose ``set_timesteps(spec.steps)`` comes nearest to ``spec.sigmas()``."""
    wanted = spec.sigmas()
    config: dict[str, Any] = {"shift": 1.0, "stochastic_sampling": spec.stochastic}
    if spec.steps > 1:  # with one step shift_terminal would divide by 1 - s = 0
        config["shift_terminal"] = wanted[-1]
    if spec.steps > 2:
        config["shift"] = _nearest_shift(wanted)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(spec.steps)
    made = tuple(scheduler.timesteps.tolist())
    # Against the sampler's own t, which is computed in fp32 as well.
    asked = (torch.tensor(wanted, dtype=torch.float32) * 1000).tolist()
    deviation = max(abs(a - b) for a, b in zip(made, asked, strict=True))
    return StockSchedule(config=config, timesteps=made, deviation=deviation)


def stretched_sigmas(steps: int, shift: float, terminal: float) -> list[float]:
    """What ``set_timesteps`` makes of (N, k, shift_terminal), in fp64; N >= 2."""
    low = shift_sigma(0.001, shift)
    grid = [1 + (low - 1) * i / (steps - 1) for i in range(steps)]
    noise_free = [1 - shift_sigma(u, shift) for u in grid]
    return [1 - x * (1 - terminal) / noise_free[-1] for x in noise_free]


def _nearest_shift(wanted: Sequence[float]) -> float:
    """k in [1e-3, 31.6] with the smallest largest deviation: a log grid, then golden section."""

    def error(log_k: float) -> float:
        made = stretched_sigmas(len(wanted), math.exp(log_k), wanted[-1])
        return max(abs(a - b) for a, b in zip(made, wanted, strict=True))

    step = (_LOG_HIGH - _LOG_LOW) / _GRID
    best = min((_LOG_LOW + i * step for i in range(_GRID + 1)), key=error)
    low, high = best - step, best + step
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return math.exp((low + high) / 2)
