"""How noise levels are drawn in training. No torch here: run files are checked without it."""

from __future__ import annotations

from typing import Any, Literal

from attrs import field, frozen
from attrs.validators import in_
from distill_protocols.validators import above, within

TimeDistribution = Literal["uniform", "logit_normal"]

_SCALE = "t = 1000 sigma runs from 0 (clean) to 1000 (noise)"
_SHIFT = "S_k(u) = k u / (1 + (k - 1) u) maps noise levels onto [0, 1] for positive k only"


def _read(time: TimeSampling, attribute: Any, value: float) -> None:
    if time.distribution == "uniform" and value != attribute.default:
        raise ValueError(
            f"{value} has no effect: distribution: uniform reads neither mean nor std. "
            "Set distribution: logit_normal, or leave it out."
        )


def _above_t_min(time: TimeSampling, _: Any, value: float) -> None:
    if not value > time.t_min:
        raise ValueError(f"{value} must be above t_min ({time.t_min}): nothing lies between them")


@frozen(kw_only=True)
class TimeSampling:
    """Distribution of t, drawn per sample: ``t = clamp(1000 S_shift(u), t_min, t_max)``.

    Attributes:
        distribution: uniform: u ~ U[0, 1). logit_normal: u = sigmoid(N(mean, std)) (SD3, Esser
            et al. 2024, eq. 19), which favours the middle.
        mean: of the normal before the sigmoid; positive favours noise. logit_normal only.
        std: of the normal before the sigmoid. logit_normal only.
        shift: flow shift k in ``S_k(u) = k u / (1 + (k - 1) u)``; above 1 favours noise.
        t_min: lower clamp of t.
        t_max: upper clamp of t.
    """

    distribution: TimeDistribution = field(
        default="uniform", validator=in_(("uniform", "logit_normal"))
    )
    mean: float = field(
        default=0.0, validator=[within(-20, 20, "the sigmoid saturates beyond"), _read]
    )
    std: float = field(default=1.0, validator=[above(0, "it is a standard deviation"), _read])
    shift: float = field(default=1.0, validator=above(0, _SHIFT))
    t_min: float = field(default=0.0, validator=within(0, 1000, _SCALE))
    t_max: float = field(default=1000.0, validator=[within(0, 1000, _SCALE), _above_t_min])
