"""Exit steps: at which step of its sampler the student is trained, and how often. No torch here.

A rollout calls the student up to its exit step, and the call there is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from distill_methods.time_sampling import fraction_within

ExitChoice = Literal["uniform", "last"] | tuple[float, ...]
"""All steps alike, the last alone, or a weight for each step."""


class ExitSteps(NamedTuple):
    """Exit steps that may be drawn, with their relative weights."""

    steps: tuple[int, ...]
    weights: tuple[float, ...]


def exit_weights(choice: ExitChoice, steps: int) -> tuple[float, ...]:
    """Return the relative weight of each of ``steps`` exit steps; they add up to ``steps``."""
    if choice == "uniform":
        return (1.0,) * steps
    if choice == "last":
        return (*[0.0] * (steps - 1), float(steps))
    return tuple(steps * weight / sum(choice) for weight in choice)


def weight_within(
    levels: Sequence[float], weights: Sequence[float], low: float, high: float
) -> float:
    """Return which part of ``weights`` belongs to those of ``levels`` t that lie in [low, high);
    t = 1000 counts for the range that ends there."""
    inside = [w for t, w in zip(levels, weights, strict=True) if fraction_within([t], low, high)]
    return sum(inside) / sum(weights)


def exit_choice_problem(choice: ExitChoice, steps: int) -> str | None:
    """Say why ``choice`` is none of a sampler of so many steps; None where it is one."""
    if choice in ("uniform", "last"):
        return None
    if len(choice) != steps:
        return (
            f"{list(choice)} has {len(choice)} weights, and student_sampler takes {steps} steps, "
            "each of which may be the exit. Give one a step, or uniform, or last"
        )
    if not all(0 <= weight < float("inf") for weight in choice) or not sum(choice) > 0:
        return (
            f"{list(choice)} must be finite, none below 0, and not all 0: how often each step is "
            "the exit"
        )
    return None
