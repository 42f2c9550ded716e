"""Shares of a distribution of t that fall into ranges of it. No torch: plans need them.

A model of two experts has one for each side of a boundary. All calls of one iteration that a role
learns from are made on one side (see ``Draws.times``), so the share of a range is also the
share of updates that its expert can expect.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, log
from statistics import NormalDist

from distill_protocols import shift_sigma

from distill_methods.time_sampling import TimeSampling

Range = tuple[float, float]
"""t in [low, high); 1000 itself is in the range that ends there."""

TOP = 1000.0
_NORMAL = NormalDist()


def below(time: TimeSampling, t: float) -> float:
    """P(t' < t) of ``t' = clamp(1000 S_k(u), t_min, t_max)``."""
    if t <= time.t_min:
        return 0.0
    if t > time.t_max or t >= TOP:
        return 1.0
    u = shift_sigma(t / TOP, 1 / time.shift)  # S_k after S_1/k is the identity
    if time.distribution == "uniform":
        return u
    return _NORMAL.cdf((_logit(u) - time.mean) / time.std)


def share(time: TimeSampling, low: float, high: float) -> float:
    """P(low <= t < high); 1000 is counted to the range that ends there."""
    return (1.0 if high >= TOP else below(time, high)) - below(time, low)


def share_of_levels(levels: Iterable[float], low: float, high: float) -> float:
    """Part of ``levels`` that lies in the range."""
    inside = [low <= t < high or t == high == TOP for t in levels]
    return sum(inside) / len(inside)


def _logit(u: float) -> float:
    return log(u / (1 - u)) if 0 < u < 1 else (inf if u >= 1 else -inf)
