"""Options of teacher-only distillation. No torch here: run files are checked without it."""

from __future__ import annotations

from attrs import field, frozen
from distill_protocols import SamplerSpec
from distill_protocols.plugins import RoleNeed
from distill_protocols.validators import at_least

from distill_methods.roles import STUDENT, TEACHER
from distill_methods.time_ranges import share
from distill_methods.time_sampling import TimeSampling


@frozen(kw_only=True)
class TeacherOnlyConfig:
    """Guidance distillation (Meng et al. 2023, stage one) at a fixed guidance.

    Attributes:
        guidance_scale: w of the teacher, ``u + w (c - u)``; 1 copies its conditional
            prediction. Meng et al. write ``(1 + w') c - w' u``, which is w = w' + 1.
        time: at which t student and teacher are compared.
        student_sampler: how the student is sampled in validation and export. Its guidance is
            best left at 1, as the student already holds the teacher's.
    """

    guidance_scale: float = field(
        default=5.0, validator=at_least(0, "u + w (c - u) with w < 0 leads away from the prompt")
    )
    time: TimeSampling = field(default=TimeSampling(shift=5.0))
    student_sampler: SamplerSpec = field(default=SamplerSpec(steps=50, shift=5.0))

    @property
    def needs(self) -> tuple[RoleNeed, ...]:
        """Roles that are called."""
        return (STUDENT, TEACHER)

    def turns(self, iteration: int) -> tuple[str, ...]:
        """Roles that learn in ``iteration`` (1-based): always the student."""
        return ("student",)

    @property
    def teacher_guided(self) -> bool:
        """Whether a step calls the teacher with a negative condition."""
        return self.guidance_scale != 1

    @property
    def guided(self) -> bool:
        """Whether a step or the student's sampler needs a negative condition."""
        return self.teacher_guided or self.student_sampler.guided

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the adapter must be able to do."""
        return ("pred:v", *(("supports_cfg",) if self.guided else ()))

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodPlugin.update_share``."""
        return share(self.time, low, high)
