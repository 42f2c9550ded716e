"""Options of Phased DMD. No torch here: run files are checked without it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from attrs import evolve, field, frozen
from distill_protocols import ONE_TENSOR, PlannedRun, Problem, SamplerSpec
from distill_protocols.validators import at_least

from distill_methods.adversarial.config import GanConfig
from distill_methods.distribution_matching.config import is_unguided
from distill_methods.distribution_matching.whole_clips import WholeClipConfig
from distill_methods.exits import weight_within
from distill_methods.latent_config import can_be_left_early
from distill_methods.roles import STUDENT
from distill_methods.time_sampling import MAX_T, TimeSampling

TWO_EXPERTS = (
    "has one expert here, and Phased DMD trains two, each in its own range of noise levels. Give "
    "student, critic and teachers both experts, or use dmd2"
)


class Phases(NamedTuple):
    """The two ranges of noise levels that experts are trained in.

    Attributes:
        boundary: t from which on the expert for high noise levels is called.
        t_end: t at which its phase ends: the first step of the other one.
    """

    boundary: float
    t_end: float


def _has_no_discriminator(_config: object, _attribute: object, value: GanConfig | None) -> None:
    if value is not None:
        raise ValueError(
            "a discriminator reads clean clips, and the expert for high noise levels makes none. "
            "Leave gan out, or use dmd2"
        )


@frozen(kw_only=True)
class PhasedDMDConfig(WholeClipConfig):
    """Phased DMD (arXiv:2510.27684) of a student of two experts.

    Attributes:
        student_sampler: as of all distribution matching. Its first step below the boundary of the
            experts ends the first phase, so it must have steps on both sides.
        score_margin: how far above that step's t the scores of the first phase begin. Nearer, the
            critic's target has a variance without bound.
        gan: none: a discriminator reads clean clips.
    """

    student_sampler: SamplerSpec = field(
        default=SamplerSpec(steps=4, shift=7.0), validator=[is_unguided, can_be_left_early]
    )
    score_margin: float = field(
        default=20.0, validator=at_least(0, "the scores would begin below the phase's own end")
    )
    gan: GanConfig | None = field(default=None, validator=_has_no_discriminator)

    @property
    def needs_latents(self) -> bool:
        """Whether clips of the data are read: never."""
        return False

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        return (*super().capabilities, ONE_TENSOR, "supports_expert_routing")

    def rollout_times(self, low: float, high: float) -> tuple[float, ...]:
        """See ``LatentMethodConfig.rollout_times``."""
        return self.levels_until(low, high)

    def phases(self, boundary: float) -> Phases:
        """Return the phases of experts that change at t = ``boundary``.

        Raises:
            ValueError: one of them has no step that is trained, or no t for its scores.
        """
        levels, weights = self.student_levels, self.exit_weights
        sides = {"high": (boundary, MAX_T), "low": (0.0, boundary)}
        for side, limits in sides.items():
            if not weight_within(levels, weights, *limits) > 0:
                raise ValueError(
                    f"student_sampler calls the student at t = {_as_text(levels)}, and no exit is "
                    f"in the range of the expert for {side} noise levels, {limits[0]:g} to "
                    f"{limits[1]:g}. Choose timesteps or a shift with steps on both sides"
                )
        phases = Phases(boundary, next(t for t in levels if t < boundary))
        for is_high, time in itertools.product((True, False), (self.score_time, self.critic_time)):
            self.phase_time(phases, time or self.score_time, is_high=is_high)
        return phases

    def phase_time(self, phases: Phases, time: TimeSampling, *, is_high: bool) -> TimeSampling:
        """Return ``time`` as it is drawn in a phase: between its limits and nowhere else.

        Raises:
            ValueError: no t is left.
        """
        low, high = time.t_min, min(phases.t_end, time.t_max)
        if is_high:
            low = max(phases.boundary, phases.t_end + self.score_margin, time.t_min)
            high = time.t_max
        if not low < high:
            raise ValueError(
                f"scores of the phase of {'high' if is_high else 'low'} noise levels would be "
                f"taken at t from {low:g} to {high:g}, which is empty: the first phase ends at t = "
                f"{phases.t_end:g}. Widen the limits of the scores' t, or lower score_margin"
            )
        return evolve(time, t_min=low, t_max=high, limits="truncate")

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``: of all roles that are trained, the share of the exit
        steps, as a clip's scores are taken in the phase that it left."""
        return weight_within(self.student_levels, self.exit_weights, low, high)

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``."""
        yield from super().problems(run)
        if run.experts is None or STUDENT.name not in run.roles:
            return
        called = {need.name for need in self.roles} & set(run.roles)
        for name in sorted(called - run.experts):
            yield Problem((), f"{name!r} {TWO_EXPERTS}")
        if STUDENT.name in run.boundaries:
            try:
                self.phases(run.boundaries[STUDENT.name])
            except ValueError as error:
                yield Problem((), str(error))


def _as_text(levels: tuple[float, ...]) -> str:
    return ", ".join(f"{t:.6g}" for t in levels)
