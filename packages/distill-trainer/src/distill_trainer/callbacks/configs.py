"""The config classes of the callbacks. No torch here: run files are checked by them."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen
from attrs.validators import in_, optional
from distill_protocols.validators import above, at_least

_DECAY = 0.99


@frozen(kw_only=True)
class EmaConfig:
    """Averages of weights, moved once in each update of their module.

    Attributes:
        roles: trainable roles to average.
        decay: d in e <- d e + (1 - d) p.
        half_life: moves after which a weight counts half, in the place of ``decay``:
            d = 2^(-1 / half_life).
        per: update: an average moves when its module was updated. iteration: in every iteration
            (FastVideo), so that with one update in N it moves N times towards the same weights.
        start_update: up to this move of an average it only copies.
    """

    roles: tuple[str, ...] = field()
    decay: float = field(default=_DECAY)
    half_life: float | None = field(
        default=None, validator=optional(above(0, "a weight counts half after so many moves"))
    )
    per: Literal["update", "iteration"] = field(
        default="update", validator=in_(("update", "iteration"))
    )
    start_update: int = field(
        default=0, validator=at_least(0, "it counts moves; 0 averages from the first one on")
    )

    @property
    def decay_per_move(self) -> float:
        """d, by whichever of the two keys is there."""
        return self.decay if self.half_life is None else 0.5 ** (1 / self.half_life)

    @roles.validator
    def _check_roles(self, attribute: object, value: tuple[str, ...]) -> None:
        if not value:
            raise ValueError("[] must name a role: nothing would be averaged. Leave ema out")

    @half_life.validator
    def _check_half_life(self, attribute: object, value: float | None) -> None:
        if value is not None and self.decay != _DECAY:
            raise ValueError(
                f"{value:g} says the same as decay ({self.decay:g}) in other words: the decay of "
                f"this half-life is {0.5 ** (1 / value):.6g}. Leave one of them out"
            )

    @decay.validator
    def _check_decay(self, attribute: object, value: float) -> None:
        if not 0 <= value < 1:
            raise ValueError(
                f"{value:g} must lie in [0, 1): it is the share of the old average that is kept, "
                "and at 1 it would never move"
            )


@frozen(kw_only=True)
class GradClipConfig:
    """Gradient clipping, with one norm for each optimizer.

    Attributes:
        max_norm: the total L2 norm that gradients are scaled down to; null clips nothing.
    """

    max_norm: float | None = field(
        default=1.0,
        validator=optional(above(0, "gradients are scaled down to it. Set null to clip nothing")),
    )


@frozen(kw_only=True)
class StepTimerConfig:
    """Seconds per iteration and samples per second.

    Attributes:
        window: number of iterations that the mean is taken over.
    """

    window: int = field(default=20, validator=at_least(1, "a mean needs an iteration"))


@frozen(kw_only=True)
class ProfilerConfig:
    """A torch.profiler trace in ``profile/``.

    Attributes:
        start: the first iteration traced; let some pass, as the first ones are not typical.
        steps: number of iterations traced.
        shapes: record the shapes of operands too (slower, larger).
        all_ranks: write a trace of every process, instead of the first one's only.
    """

    start: int = field(default=10, validator=at_least(1, "iterations count from 1"))
    steps: int = field(
        default=3, validator=at_least(1, "a trace needs an iteration. Leave profiler out for none")
    )
    shapes: bool = False
    all_ranks: bool = False


@frozen(kw_only=True)
class ParamCountConfig:
    """A table of parameters by role and module. It has no keys."""


@frozen(kw_only=True)
class DebugDumpConfig:
    """Outputs and losses of a step on disk.

    Attributes:
        every_steps: iterations between two dumps; 0: none.
        on_exception: dump the last finished step when the run fails (keeps its outputs in
            memory for one iteration).
    """

    every_steps: int = field(
        default=0, validator=at_least(0, "it is an interval; 0 dumps only after an error")
    )
    on_exception: bool = True
