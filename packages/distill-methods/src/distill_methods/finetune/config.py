"""Options of finetuning. No torch here: run files are checked without it."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen
from attrs.validators import in_
from distill_protocols import SamplerSpec
from distill_protocols.plugins import RoleNeed

from distill_methods.roles import STUDENT
from distill_methods.time_ranges import share
from distill_methods.time_sampling import TimeSampling


@frozen(kw_only=True)
class FinetuneConfig:
    """Flow matching on data. Condition dropout belongs to the data loader.

    Attributes:
        time: at which t the student learns.
        weighting: none: every t counts alike (FastGen, FastVideo). bsmntw: a bell over t that is
            0 at both ends (DiffSynth-Studio).
        student_sampler: how the student is sampled in validation and export, guidance included.
    """

    time: TimeSampling = field(default=TimeSampling(shift=5.0))
    weighting: Literal["none", "bsmntw"] = field(default="none", validator=in_(("none", "bsmntw")))
    student_sampler: SamplerSpec = field(default=SamplerSpec(steps=50, shift=5.0, guidance=5.0))

    @property
    def needs(self) -> tuple[RoleNeed, ...]:
        """Roles that are called."""
        return (STUDENT,)

    def turns(self, iteration: int) -> tuple[str, ...]:
        """Roles that learn in ``iteration`` (1-based): always the student."""
        return ("student",)

    @property
    def guided(self) -> bool:
        """Whether the student's sampler needs a negative condition; a step never does."""
        return self.student_sampler.guided

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the adapter must be able to do."""
        return ("pred:v", *(("supports_cfg",) if self.guided else ()))

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodPlugin.update_share``."""
        return share(self.time, low, high)
