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

UniPCMultistepScheduler takes linspace(1, 1/1000, N + 1) without its end, or the pipeline's grid,
shifts it once (``flow_shift``), and has a ``shift_terminal`` as well. The first grid is that of a
SamplerSpec with this solver, which is so met by its own shift; all others as above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Union

import numpy as np
import torch
from attrs import frozen
from diffusers.schedulers.scheduling_flow_map_euler_discrete import FlowMapEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from distill_protocols import SamplerSpec, shift_sigma

_LOG_LOW, _LOG_HIGH = math.log(1e-3), math.log(math.sqrt(1e3))
_GRID = 300
_NEIGHBOURS, _STEP = 120, 2e-9


class StepGrid(Protocol):
    """The grid u that a pipeline has the scheduler start from."""

    def set_timesteps(self, scheduler: StockScheduler, steps: int) -> None:
        """Call the scheduler as the pipeline does."""
        ...

    def last(self, steps: int, shift: float) -> float:
        """u of the last step, of FlowMatchEulerDiscreteScheduler."""
        ...

    def sigmas(self, steps: int, shift: float, terminal: float) -> list[float]:
        """Compute that scheduler's noise levels operation by operation; at least two steps."""
        ...

    def unipc(self, steps: int) -> np.ndarray:
        """u of each step, of UniPCMultistepScheduler."""
        ...


class SchedulerGrid(StepGrid):
    """linspace(1, S_k(1/1000), N) in fp64: of pipelines that give a number of steps alone."""

    def set_timesteps(self, scheduler: StockScheduler, steps: int) -> None:
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

    def unipc(self, steps: int) -> np.ndarray:
        return np.linspace(1, 1 / 1000, steps + 1)[:-1]


class UniformGrid(StepGrid):
    """linspace(1, 1/N, N) in fp32: of pipelines that give their own sigmas.

    A pipeline with another last one overrides ``last``.
    """

    def set_timesteps(self, scheduler: StockScheduler, steps: int) -> None:
        scheduler.set_timesteps(sigmas=self.unipc(steps))  # type: ignore[arg-type] - uses numpy

    def last(self, steps: int, shift: float) -> float:
        return 1 / steps

    def sigmas(self, steps: int, shift: float, terminal: float) -> list[float]:
        # In numpy and in fp32, as the scheduler does: torch may round a division otherwise.
        grid = self.unipc(steps).astype(np.float32)
        noise_free = 1 - shift_sigma(grid, shift)
        return (1 - noise_free / (noise_free[-1] / (1 - terminal))).tolist()

    def unipc(self, steps: int) -> np.ndarray:
        return np.linspace(1.0, self.last(steps, 1.0), steps)


@frozen
class GivenTimes(StepGrid):
    """The sampler's own noise levels: of pipelines whose call takes a list of ``timesteps``."""

    of: Sequence[float]

    def set_timesteps(self, scheduler: StockScheduler, steps: int) -> None:
        # As the scheduler derives them from timesteps alone, of which it warns.
        sigmas = np.array(self.timesteps, np.float32) / 1000
        options: Any = {"sigmas": sigmas, "timesteps": self.timesteps}
        scheduler.set_timesteps(**options)

    @property
    def timesteps(self) -> list[float]:
        """The argument of the call: t of each step, from 0 to 1000."""
        return [1000 * sigma for sigma in self.of]

    def last(self, steps: int, shift: float) -> float:
        return self.of[-1]

    def sigmas(self, steps: int, shift: float, terminal: float) -> list[float]:
        return list(self.of)

    def unipc(self, steps: int) -> np.ndarray:
        return np.array(self.of)


@frozen
class _UniPCGrid(StepGrid):
    """What UniPCMultistepScheduler makes of a pipeline's grid, but for the 1e-6 that it takes off
    a first noise level of 1."""

    of: StepGrid

    def set_timesteps(self, scheduler: StockScheduler, steps: int) -> None:
        self.of.set_timesteps(scheduler, steps)

    def last(self, steps: int, shift: float) -> float:
        return float(self.of.unipc(steps)[-1])

    def sigmas(self, steps: int, shift: float, terminal: float) -> list[float]:
        noise_free = 1 - shift_sigma(self.of.unipc(steps), shift)
        return (1 - noise_free / (noise_free[-1] / (1 - terminal))).tolist()

    def unipc(self, steps: int) -> np.ndarray:
        return self.of.unipc(steps)


StockScheduler = Union[  # noqa: UP007
    FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, FlowMapEulerDiscreteScheduler
]


@frozen(kw_only=True)
class StockSchedule:
    """A scheduler configuration, and how near it comes to the sampler.

    Attributes:
        scheduler_class: of diffusers.
        config: arguments of it.
        timesteps: t of each step as the scheduler makes them.
        sampler_timesteps: t of each step as the sampler calls the model.
        deviation: largest |t - t of the sampler|, in units of t (0 to 1000). Of noise levels, where
            the scheduler rounds t down to whole numbers.
    """

    scheduler_class: type[StockScheduler]
    config: dict[str, Any]
    timesteps: tuple[float, ...]
    sampler_timesteps: tuple[float, ...]
    deviation: float

    @property
    def class_name(self) -> str:
        """Name of the scheduler's class, as ``model_index.json`` has it."""
        return self.scheduler_class.__name__

    def scheduler(self) -> StockScheduler:
        """Build the scheduler."""
        return self.scheduler_class(**self.config)


def unipc_scheduler(spec: SamplerSpec) -> UniPCMultistepScheduler:
    """Build the scheduler that walks ``spec.sigmas()``, whatever they come from."""
    scheduler = UniPCMultistepScheduler(**_UNIPC)
    # A flow_shift of 1 leaves sigmas as they are, to the last bit.
    scheduler.set_timesteps(sigmas=np.array(spec.sigmas()))  # type: ignore[arg-type] - uses numpy
    scheduler.set_begin_index(0)
    return scheduler


_UNIPC: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
"""As Wan's pipelines have it; the other defaults (order 2, bh2, predict_x0) are theirs as well."""


def stock_schedule(spec: SamplerSpec, grid: StepGrid | None = None) -> StockSchedule:
    """Find the configuration whose timesteps come nearest to ``spec.sigmas()``.

    Args:
        grid: what the pipeline starts from; None: ``SchedulerGrid``.
    """
    grid = grid or SchedulerGrid()
    if spec.solver == "unipc":
        return _unipc_schedule(spec, grid)
    sigmas = spec.sigmas()
    config: dict[str, Any] = {"shift": 1.0, "stochastic_sampling": spec.stochastic}
    # With one step shift_terminal would divide by 1 - s = 0.
    if spec.steps > 1 and not isinstance(grid, GivenTimes):
        config["shift"], config["shift_terminal"] = _nearest(sigmas, grid)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**config)
    grid.set_timesteps(scheduler, spec.steps)
    timesteps = tuple(float(t) for t in scheduler.timesteps)
    # Against the sampler's own t, which is computed in fp32 as well.
    sampler_times = (torch.tensor(sigmas, dtype=torch.float32) * 1000).tolist()
    return StockSchedule(
        scheduler_class=FlowMatchEulerDiscreteScheduler,
        config=config,
        timesteps=timesteps,
        sampler_timesteps=tuple(1000 * sigma for sigma in sigmas),
        deviation=_largest_difference(timesteps, sampler_times),
    )


def flow_map_schedule(spec: SamplerSpec) -> StockSchedule:
    """Return the scheduler of flow maps, which walks ``S_k(1 - i/N)`` in fp64, or the times that
    its pipeline's call is given."""
    grid: StepGrid = GivenTimes(spec.sigmas())
    config: dict[str, Any] = {"shift": 1.0}
    if spec.timesteps is None and isinstance(spec.shift, float | int):
        grid, config = SchedulerGrid(), {"shift": float(spec.shift)}
    scheduler: Any = FlowMapEulerDiscreteScheduler(**config)
    grid.set_timesteps(scheduler, spec.steps)
    timesteps, sampler_times = scheduler.timesteps.tolist(), [1000 * s for s in spec.sigmas()]
    return StockSchedule(
        scheduler_class=FlowMapEulerDiscreteScheduler,
        config=config,
        timesteps=tuple(timesteps),
        sampler_timesteps=tuple(sampler_times),
        deviation=_largest_difference(timesteps, sampler_times),
    )


def _unipc_schedule(spec: SamplerSpec, grid: StepGrid) -> StockSchedule:
    own = unipc_scheduler(spec)

    def made_by(config: Mapping[str, Any]) -> tuple[Any, float]:
        scheduler: Any = UniPCMultistepScheduler(**config)
        grid.set_timesteps(scheduler, spec.steps)
        return scheduler, 1000 * _largest_difference(scheduler.sigmas.tolist(), own.sigmas.tolist())

    # The grid of a spec is the scheduler's own, unless times are given or the pipeline gives some.
    shift = spec.shift if isinstance(spec.shift, float | int) else 1.0
    config = {**_UNIPC, "flow_shift": float(shift)}
    scheduler, deviation = made_by(config)
    if deviation > 0 and spec.steps > 1:
        shift, terminal = _nearest(spec.sigmas(), _UniPCGrid(grid))
        config |= {"flow_shift": shift, "shift_terminal": terminal}
        scheduler, deviation = made_by(config)
    return StockSchedule(
        scheduler_class=UniPCMultistepScheduler,
        config=config,
        timesteps=tuple(float(t) for t in scheduler.timesteps),
        sampler_timesteps=tuple(float(t) for t in own.timesteps),
        deviation=deviation,
    )


def _largest_difference(some: Iterable[float], others: Iterable[float]) -> float:
    return max(abs(float(a) - float(b)) for a, b in zip(some, others, strict=True))


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
