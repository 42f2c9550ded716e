"""Options that all methods of this package share. No torch here: run files are checked without
it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

from attrs import field, frozen
from distill_protocols import MethodConfig, PlannedRun, Problem, RoleNeed, SamplerSpec

from distill_methods.exits import exit_weights
from distill_methods.roles import STUDENT
from distill_methods.time_sampling import MAX_T, fraction_within

RolloutSource = Literal["simulate", "data"]
"""Where the input of the student's training call comes from: its own sampling from noise (DMD2,
section 4.5, backward simulation), or a noised clip of the data set (FastGen, CausVid)."""

ROLLOUT_METRICS = ("student_mean", "student_std", "exit_step")
"""Metrics of every turn that makes clips of the student (``Rollout.outputs``)."""


def can_be_left_early(_config: object, _attribute: object, value: SamplerSpec) -> None:
    """Validate ``student_sampler`` of a student that is trained at the steps of its sampler."""
    if value.solver != "euler":
        raise ValueError(
            f"solver {value.solver} makes each step of several calls, and this method trains the "
            "student one call at a time, at the steps that its sampler takes. Use solver: euler "
            "here; views and reports of a teacher may name another"
        )


@frozen(kw_only=True, slots=False)  # Without slots, so that a config may have a second base.
class LatentMethodConfig(MethodConfig):
    """The description of a method whose student is sampled as latents.

    A subclass states ``roles``; whatever else ``MethodConfig`` has, where the default is not true
    of the method.

    Attributes:
        student_sampler: how the student is sampled in validation and export.
    """

    student_sampler: SamplerSpec = field()

    @property
    @abstractmethod
    def roles(self) -> tuple[RoleNeed, ...]:
        """Roles that the method calls; any other role of a run is an error."""

    def turns(self, iteration: int) -> tuple[str, ...]:
        """Return the roles whose optimizers step in ``iteration`` (1-based): by default all that
        are trained, in every iteration."""
        return tuple(need.name for need in self.roles if need.trainable)

    @property
    def student_levels(self) -> tuple[float, ...]:
        """t at each step of ``student_sampler``, falling; 0 is not among them."""
        return tuple(1000 * sigma for sigma in self.student_sampler.sigmas())

    @property
    def exit_weights(self) -> tuple[float, ...]:
        """Relative weight of each step of ``student_sampler`` as the exit of a rollout; by default
        all are alike."""
        return exit_weights("uniform", self.student_sampler.steps)

    def rollout_times(self, low: float, high: float) -> tuple[float, ...]:
        """Return t of the student's calls in a rollout that is trained at its steps in [low, high);
        by default there are no rollouts."""
        return ()

    def levels_until(self, low: float, high: float) -> tuple[float, ...]:
        """Return the ``student_levels`` down to the last in [low, high)."""
        levels = self.student_levels
        inside = [i for i, t in enumerate(levels) if fraction_within([t], low, high)]
        return levels[: inside[-1] + 1] if inside else ()

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``: rules of roles that cannot be called at every t."""
        low, high = run.time_limits.get(STUDENT.name, (0.0, MAX_T))
        for name, (start, end) in run.time_limits.items():
            if name != STUDENT.name and not (start <= low and high <= end):
                yield Problem(
                    (),
                    f"{run.describe_limits(name)}, and the student is trained at t from {low:g} to "
                    f"{high:g}. Give {name!r} the experts that the student has, or both; or a "
                    "model that knows the student's times",
                )
        times = self.rollout_times(low, high)
        if missed := [t for t in times if not fraction_within([t], low, high)]:
            way_out = (
                "Let the student begin with data, where the method can (rollout: data), or give it "
                "both experts"
                if run.roles[STUDENT.name].experts
                else "Write timesteps within these (student_sampler)"
            )
            yield Problem(
                (),
                f"{run.describe_limits(STUDENT.name)}, and its rollouts call it at t = "
                f"{', '.join(f'{t:.6g}' for t in missed)} too. {way_out}",
            )
