"""The stock scheduler that repeats a SamplerSpec inside ``WanPipeline.__call__``.

``__call__`` takes a number of steps and nothing else about time, so the timesteps must follow from
the scheduler's own configuration. diffusers' FlowMatchEulerDiscreteScheduler makes them so, with
shift k, N steps and sigma_min = S_k(1/1000):

    u_i = linspace(1, sigma_min, N);  s_i = S_k(u_i);  1 - s_i is then scaled so that the last s_i
    is ``shift_terminal``.

Written out, ``1 - s_i = A i / (1 - B i)``, with A free through ``shift_terminal`` and B through k.
A grid ``S_m(1 - i/N)`` has just this form, so every SamplerSpec with a shift is met; two timesteps
are met by ``shift_terminal`` alone, three by both (within k's reach), and four or more freely
chosen ones as nearly as a single k allows. The first is always 1000. B rises with k up to k = 31.6
and falls beyond (sigma_min rises as well), so k is sought below: m up to about 20 is met.

What is met is met in fp32, bit for bit, but for a few schedules of more than 40 steps, where a
single sigma may come out one fp32 step (6e-5 of 1000) aside.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from attrs import frozen
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from distill_protocols import SamplerSpec, shift_sigma

_LOG_LOW, _LOG_HIGH = math.log(1e-3), math.log(math.sqrt(1e3))
_GRID = 300
_NEIGHBOURS, _STEP = 120, 2e-9


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
    """The configuration whose ``set_timesteps(spec.steps)`` comes nearest to ``spec.sigmas()``.

    Where it is met, it is met bit for bit: the fp32 sigmas are the sampler's own.
    """
    wanted = spec.sigmas()
    config: dict[str, Any] = {"shift": 1.0, "stochastic_sampling": spec.stochastic}
    if spec.steps > 1:  # with one step shift_terminal would divide by 1 - s = 0
        config["shift_terminal"] = wanted[-1]
    if spec.steps > 2:
        config["shift"], config["shift_terminal"] = _nearest(wanted)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**config)
    scheduler.set_timesteps(spec.steps)
    made = tuple(scheduler.timesteps.tolist())
    # Against the sampler's own t, which is computed in fp32 as well.
    asked = (torch.tensor(wanted, dtype=torch.float32) * 1000).tolist()
    deviation = max(abs(a - b) for a, b in zip(made, asked, strict=True))
    return StockSchedule(config=config, timesteps=made, deviation=deviation)


def stretched_sigmas(steps: int, shift: float, terminal: float) -> list[float]:
    """What ``set_timesteps`` makes of (N, k, shift_terminal), operation by operation; N >= 2."""
    high, low = (1000 * sigma for sigma in _ends(shift))
    step = (low - high) / (steps - 1)
    grid = [(high + i * step) / 1000 for i in range(steps - 1)] + [low / 1000]
    noise_free = [1 - shift_sigma(u, shift) for u in grid]
    factor = noise_free[-1] / (1 - terminal)
    return [1 - x / factor for x in noise_free]


def _ends(shift: float) -> list[float]:
    """sigma_max and sigma_min: S_k(1) and S_k(1/1000), which the scheduler computes in fp32.

    S_k(1) is not always 1: k - 1 is rounded before 1 is added again.
    """
    return shift_sigma(torch.tensor([1000.0, 1.0]) / 1000, shift).tolist()


def _nearest(wanted: Sequence[float]) -> tuple[float, float]:
    """(k in [1e-3, 31.6], shift_terminal): meeting ``wanted`` in fp32, or with least deviation."""
    asked = _fp32(wanted)

    def deviation(pair: tuple[float, float]) -> float:
        made = _fp32(stretched_sigmas(len(wanted), *pair))
        return max(abs(a - b) for a, b in zip(made, asked, strict=True))

    solved = _solved_shift(wanted)
    candidates = [] if solved is None else list(_neighbours(solved, wanted[-1]))
    met = next((pair for pair in candidates if deviation(pair) == 0), None)
    return met or min([(_closest_shift(wanted), wanted[-1]), *candidates[:1]], key=deviation)


def _neighbours(shift: float, terminal: float) -> Iterator[tuple[float, float]]:
    """Itself first, then outwards by small parts of fp32's own step: S_k(1) may be 1 there, or a
    sigma fall on the other side of a rounding."""
    for distance in range(_NEIGHBOURS):
        for k in (shift * (1 - distance * _STEP), shift * (1 + distance * _STEP)):
            for steps in (0, 1, -1, 2, -2, 3, -3, 4, -4):
                yield k, terminal * (1 + 2 * steps * _STEP)


def _solved_shift(wanted: Sequence[float]) -> float | None:
    """k whose B is that of the first and last sigmas below 1, by bisection to the last bit of k.

    With y_i = 1 - s_i = A i / (1 - B i) and n = N - 1: y_n / y_1 = n (1 - B) / (1 - n B). Between
    two values of the fp32 sigma_min, B rises with k without a jump, so it is hit.
    """
    n = len(wanted) - 1
    ratio = (1 - wanted[-1]) / (1 - wanted[1])
    bend = (ratio - n) / (n * (ratio - 1))

    def excess(log_k: float) -> float:
        k = math.exp(log_k)
        return (k - 1) * (1 - _ends(k)[1]) / (k * n) - bend

    low, high = _LOG_LOW, _LOG_HIGH
    if excess(low) > 0 or excess(high) < 0:
        return None
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return math.exp(high)


def _fp32(sigmas: Sequence[float]) -> list[float]:
    return torch.tensor(sigmas, dtype=torch.float32).tolist()


def _closest_shift(wanted: Sequence[float]) -> float:
    """k with the smallest largest deviation: a log grid, then golden section."""

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
