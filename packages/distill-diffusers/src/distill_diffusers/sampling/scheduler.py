"""The stock scheduler that repeats a SamplerSpec inside a pipeline of diffusers.

A pipeline is called with a number of steps and nothing else about time, so the timesteps must
follow from the scheduler's own configuration. FlowMatchEulerDiscreteScheduler makes them from a
grid u of N steps, with shift k:

    s_i = S_k(u_i);  1 - s_i is then scaled so that the last s_i is ``shift_terminal``.

Which grid it is depends on the pipeline (``StepGrid``): WanPipeline and StableDiffusion3Pipeline
give the number of steps, and the scheduler takes linspace(1, S_k(1/1000), N); LTXPipeline and
FluxPipeline give linspace(1, 1/N, N).

Written out, ``1 - s_i = A i / (1 - B i)``, with A free through ``shift_terminal`` and B through k.
A grid ``S_m(1 - i/N)`` has just this form, so every SamplerSpec with a shift is met; two timesteps
are met by ``shift_terminal`` alone, three by both (within k's reach), and four or more freely
chosen ones as nearly as a single k allows. The first is always 1000. In the scheduler's own grid B
rises with k up to k = 31.6 and falls beyond (its last u rises as well), so k is sought below: m up
to about 20 is met.

What is met in the scheduler's own grid is met in fp32, bit for bit, but for a few schedules of
more than 40 steps, where a single sigma may come out one fp32 step (6e-5 of 1000) aside. In a
pipeline's grid, which the scheduler rounds to fp32 before it shifts it, all come within two such
steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from attrs import frozen
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from distill_protocols import SamplerSpec, shift_sigma

_LOG_LOW, _LOG_HIGH = math.log(1e-3), math.log(math.sqrt(1e3))
_GRID = 300
_NEIGHBOURS, _STEP = 120, 2e-9


class StepGrid(Protocol):
    """The grid u that a pipeline has the scheduler start from."""

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        """Call the scheduler as the pipeline does."""
        ...

    def last(self, steps: int, shift: float) -> float:
        """u of the last step."""
        ...

    def sigmas(self, steps: int, shift: float, terminal: float) -> list[float]:
        """Compute the scheduler's noise levels operation by operation; at least two steps."""
        ...


class SchedulerGrid(StepGrid):
    """linspace(1, S_k(1/1000), N) in fp64: of pipelines that give a number of steps alone."""

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(steps)

    def last(self, steps: int, shift: float) -> float:
        return _ends(shift)[1]

    def sigmas(self, steps: int, shift: float, terminal: float) -> list[float]:
        high, low = (1000 * sigma for sigma in _ends(shift))
        step = (low - high) / (steps - 1)
        grid = [(high + i * step) / 1000 for i in range(steps - 1)] + [low / 1000]
        noise_free = [1 - shift_sigma(u, shift) for u in grid]
        factor = noise_free[-1] / (1 - terminal)
        return [1 - x / factor for x in noise_free]


class UniformGrid(StepGrid):
    """linspace(1, 1/N, N) in fp32: of pipelines that give their own sigmas."""

    def set_timesteps(self, scheduler: Any, steps: int) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))

    def last(self, steps: int, shift: float) -> float:
        return 1 / steps

    def sigmas(self, steps: int, shift: float, terminal: float) -> list[float]:
        # In numpy and in fp32, as the scheduler does: torch may round a division otherwise.
        grid = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
        noise_free = 1 - shift_sigma(grid, shift)
        return (1 - noise_free / (noise_free[-1] / (1 - terminal))).tolist()


@frozen(kw_only=True)
class StockSchedule:
    """A scheduler configuration, and how near it comes to the sampler.

    Attributes:
        config: arguments of FlowMatchEulerDiscreteScheduler.
        timesteps: t of each step as the scheduler makes them.
        deviation: largest |t - t of the sampler|, in units of t (0 to 1000).
    """

    config: dict[str, Any]
    timesteps: tuple[float, ...]
    deviation: float

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """Build the scheduler."""
        return FlowMatchEulerDiscreteScheduler(**self.config)


def stock_schedule(spec: SamplerSpec, grid: StepGrid | None = None) -> StockSchedule:
    """Find the configuration whose timesteps come nearest to ``spec.sigmas()``.

    Args:
        grid: what the pipeline starts from; None: ``SchedulerGrid``.
    """
    grid = grid or SchedulerGrid()
    sigmas = spec.sigmas()
    config: dict[str, Any] = {"shift": 1.0, "stochastic_sampling": spec.stochastic}
    if spec.steps > 1:  # with one step shift_terminal would divide by 1 - s = 0
        config["shift"], config["shift_terminal"] = _nearest(sigmas, grid)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**config)
    grid.set_timesteps(scheduler, spec.steps)
    timesteps = tuple(float(t) for t in scheduler.timesteps)
    # Against the sampler's own t, which is computed in fp32 as well.
    sampler_times = (torch.tensor(sigmas, dtype=torch.float32) * 1000).tolist()
    deviation = max(abs(a - b) for a, b in zip(timesteps, sampler_times, strict=True))
    return StockSchedule(config=config, timesteps=timesteps, deviation=deviation)


def _ends(shift: float) -> list[float]:
    """sigma_max and sigma_min of a scheduler: S_k(1) and S_k(1/1000), which it computes in fp32.

    S_k(1) is not always 1: k - 1 is rounded before 1 is added again.
    """
    return shift_sigma(torch.tensor([1000.0, 1.0]) / 1000, shift).tolist()


def _nearest(sigmas: Sequence[float], grid: StepGrid) -> tuple[float, float]:
    """(k in [1e-3, 31.6], shift_terminal): meeting ``sigmas`` in fp32, or with least deviation."""
    steps, terminal = len(sigmas), sigmas[-1]
    rounded = _fp32(sigmas)

    def deviation(pair: tuple[float, float]) -> float:
        made = _fp32(grid.sigmas(steps, *pair))
        return max(abs(a - b) for a, b in zip(made, rounded, strict=True))

    # Two steps are met by shift_terminal alone, whatever k is.
    solved = 1.0 if steps == 2 else _solve_shift(sigmas, grid)
    candidates = [] if solved is None else list(_neighbours(solved, terminal))
    met = next((pair for pair in candidates if deviation(pair) == 0), None)
    if met is not None:
        return met
    if steps == 2:
        return candidates[0]
    return min([(_closest_shift(sigmas, grid), terminal), *candidates[:1]], key=deviation)


def _neighbours(shift: float, terminal: float) -> Iterator[tuple[float, float]]:
    """Yield the pair itself, then others by small parts of fp32's own step: S_k(1) may be 1 there,
    or a sigma fall on the other side of a rounding."""
    for distance in range(_NEIGHBOURS):
        for k in (shift * (1 - distance * _STEP), shift * (1 + distance * _STEP)):
            for steps in (0, 1, -1, 2, -2, 3, -3, 4, -4):
                yield k, terminal * (1 + 2 * steps * _STEP)


def _solve_shift(sigmas: Sequence[float], grid: StepGrid) -> float | None:
    """k whose B is that of the first and last sigmas below 1, by bisection to the last bit of k.

    With y_i = 1 - s_i = A i / (1 - B i) and n = N - 1: y_n / y_1 = n (1 - B) / (1 - n B). A grid
    from 1 to u_n has B = (k - 1) (1 - u_n) / (k n). Between two values of an fp32 u_n, B rises
    with k without a jump, so it is hit.
    """
    n = len(sigmas) - 1
    ratio = (1 - sigmas[-1]) / (1 - sigmas[1])
    bend = (ratio - n) / (n * (ratio - 1))

    def excess(log_k: float) -> float:
        k = math.exp(log_k)
        return (k - 1) * (1 - grid.last(n + 1, k)) / (k * n) - bend

    low, high = _LOG_LOW, _LOG_HIGH
    if excess(low) > 0 or excess(high) < 0:
        return None
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return math.exp(high)


def _fp32(sigmas: Sequence[float]) -> list[float]:
    return torch.tensor(sigmas, dtype=torch.float32).tolist()


def _closest_shift(sigmas: Sequence[float], grid: StepGrid) -> float:
    """k with the smallest largest deviation: a log grid, then golden section."""

    def error(log_k: float) -> float:
        made = grid.sigmas(len(sigmas), math.exp(log_k), sigmas[-1])
        return max(abs(a - b) for a, b in zip(made, sigmas, strict=True))

    step = (_LOG_HIGH - _LOG_LOW) / _GRID
    best = min((_LOG_LOW + i * step for i in range(_GRID + 1)), key=error)
    low, high = best - step, best + step
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(80):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if error(left) < error(right) else (left, high)
    return math.exp((low + high) / 2)
