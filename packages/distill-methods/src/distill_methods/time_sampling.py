"""Distributions of the noise level t in training, and the probability of a range of t.

No torch here: run files are checked without it.

A model of two experts has one for each side of a boundary in t. All calls of one iteration that
train a role are made on one side (``NoiseSampler.sample_range``), so the probability of a range
is also the share of the updates that its expert can expect.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, log
from statistics import NormalDist
from typing import Literal

from attrs import Attribute, field, frozen
from attrs.validators import in_
from distill_protocols import shift_sigma
from distill_protocols.validators import above, within

TimeDistribution = Literal["uniform", "logit_normal"]
TimeLimits = Literal["clamp", "truncate"]

TimeRange = tuple[float, float]
"""All t in [low, high); 1000 itself belongs to the range that ends there."""

MAX_T = 1000.0
"""t of pure noise."""

_STANDARD_NORMAL = NormalDist()
_LEAST_SHARE = 1e-4
"""Of a distribution's t, within its limits: below, fp32 has too few values to draw from."""
_SCALE = "t = 1000 sigma runs from 0 (clean) to 1000 (noise)"
_SHIFT = "S_k(u) = k u / (1 + (k - 1) u) maps noise levels onto [0, 1] for positive k only"


def _has_an_effect(time: TimeSampling, attribute: Attribute[float], value: float) -> None:
    if time.distribution == "uniform" and value != attribute.default:
        raise ValueError(
            f"{value} has no effect: distribution: uniform reads neither mean nor std. "
            "Set distribution: logit_normal, or leave it out."
        )


def _is_above_t_min(time: TimeSampling, _attribute: object, value: float) -> None:
    if not value > time.t_min:
        raise ValueError(f"{value} must be above t_min ({time.t_min}): nothing lies between them")


def _leaves_something(time: TimeSampling, _attribute: object, value: TimeLimits) -> None:
    if value == "clamp":
        return
    if (time.t_min, time.t_max) == (0, MAX_T):
        raise ValueError(
            "truncate has no effect: t_min is 0 and t_max is 1000, and all t lie between them. "
            "Set one of them, or leave it out"
        )
    share = _share_below(time, time.t_max) - _share_below(time, time.t_min)
    if not share > _LEAST_SHARE:
        raise ValueError(
            f"truncate draws t from {time.t_min:g} to {time.t_max:g}, where the distribution has "
            f"{share:.2g} of its t. Widen these limits, or move the distribution (shift, mean)"
        )


@frozen(kw_only=True)
class TimeSampling:
    """Distribution of t, drawn per sample: ``t = clamp(1000 S_shift(u), t_min, t_max)``.

    Attributes:
        distribution: uniform: u ~ U[0, 1). logit_normal: u = sigmoid(N(mean, std)) (SD3, Esser
            et al. 2024, eq. 19), which favours the middle.
        mean: of the normal before the sigmoid; positive favours noise. logit_normal only.
        std: of the normal before the sigmoid. logit_normal only.
        shift: flow shift k in ``S_k(u) = k u / (1 + (k - 1) u)``; above 1 favours noise.
        t_min: lower limit of t.
        t_max: upper limit of t.
        limits: clamp: what lies beyond a limit becomes the limit itself (DMD2, Self-Forcing), so
            that at shift 5 and 980 a draw in eleven is 980. truncate: only t between the limits
            are drawn, each as likely beside the others as before.
    """

    distribution: TimeDistribution = field(
        default="uniform", validator=in_(("uniform", "logit_normal"))
    )
    mean: float = field(
        default=0.0, validator=[within(-20, 20, "the sigmoid saturates beyond"), _has_an_effect]
    )
    std: float = field(
        default=1.0, validator=[above(0, "it is a standard deviation"), _has_an_effect]
    )
    shift: float = field(default=1.0, validator=above(0, _SHIFT))
    t_min: float = field(default=0.0, validator=within(0, 1000, _SCALE))
    t_max: float = field(default=1000.0, validator=[within(0, 1000, _SCALE), _is_above_t_min])
    limits: TimeLimits = field(
        default="clamp", validator=[in_(("clamp", "truncate")), _leaves_something]
    )


def probability_below(time: TimeSampling, t: float) -> float:
    """Return P(t' < t) of what ``time`` draws: its distribution function."""
    if t <= time.t_min:
        return 0.0
    # The clamp gathers the rest of the distribution at t_max itself.
    if t > time.t_max or t >= MAX_T:
        return 1.0
    low, high = unlimited_range(time)
    return (_share_below(time, t) - low) / (high - low)


def unlimited_range(time: TimeSampling) -> tuple[float, float]:
    """Return the quantiles of ``1000 S_k(u)`` between which ``time`` draws: all, unless its limits
    truncate."""
    if time.limits == "clamp":
        return 0.0, 1.0
    return _share_below(time, time.t_min), _share_below(time, time.t_max)


def _share_below(time: TimeSampling, t: float) -> float:
    """Return P(1000 S_k(u) < t), without limits."""
    u = shift_sigma(t / MAX_T, 1 / time.shift)  # The inverse of S_k is S_1/k.
    if time.distribution == "uniform":
        return u
    return _STANDARD_NORMAL.cdf((_logit(u) - time.mean) / time.std)


def probability_within(time: TimeSampling, low: float, high: float) -> float:
    """Return P(low <= t < high); t = 1000 counts for the range that ends there."""
    return (1.0 if high >= MAX_T else probability_below(time, high)) - probability_below(time, low)


def fraction_within(levels: Iterable[float], low: float, high: float) -> float:
    """Return which part of the discrete ``levels`` t lies in [low, high); 1000 as above."""
    inside = [low <= t < high or t == high == MAX_T for t in levels]
    return sum(inside) / len(inside)


def _logit(u: float) -> float:
    return log(u / (1 - u)) if 0 < u < 1 else (inf if u >= 1 else -inf)
