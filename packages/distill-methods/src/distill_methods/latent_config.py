"""Options that all methods of this package share. No torch here: run files are checked without
it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

from attrs import field, frozen
from distill_protocols import MethodConfig, RoleNeed, SamplerSpec

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
