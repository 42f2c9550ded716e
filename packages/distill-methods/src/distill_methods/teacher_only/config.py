"""Options of teacher-only distillation. No torch here: run files are checked without it."""

from __future__ import annotations

from typing import Any, Literal

from attrs import field, frozen
from attrs.validators import in_, optional
from distill_protocols import RoleNeed, SamplerSpec
from distill_protocols.validators import at_least

from distill_methods.roles import STUDENT
from distill_methods.teachers import AWAY, TeachersConfig
from distill_methods.time_ranges import share
from distill_methods.time_sampling import TimeSampling


def _unguided_rollout(config: TeacherOnlyConfig, _: Any, value: SamplerSpec) -> None:
    if config.input == "student" and value.guided:
        w = next(w for w in value.guidances if w != 1)
        raise ValueError(
            f"guidance {w} must be 1 with input: student, whose clips are the student's own: "
            "guiding it would make others than those it is trained to make. Leave it out"
        )


@frozen(kw_only=True)
class TeacherOnlyConfig(TeachersConfig):
    """Regression on a guided teacher (Meng et al. 2023, stage one, at a fixed guidance).

    Attributes:
        guidance_scale: w of the teacher, ``u + w (c - u)``; 1 copies its conditional
            prediction. Meng et al. write ``(1 + w') c - w' u``, which is w = w' + 1.
        guidance_scale_2: w of the teacher's expert for the low noise levels, where it has two;
            left out, the same.
        teachers: several teachers by role, in the place of the one role ``teacher``: the target is
            the weighted sum of their guided predictions.
        target: v: every t counts alike. x0: the distance of the clean clips, which is that of v
            times sigma^2: noisy clips count most.
        input: data: compared at noised clips of the data set. student: at noised clips of the
            student itself, sampled whole by ``student_sampler`` (a model call a step, without
            gradient): where sampling will call it, and no data but captions.
        time: at which t student and teacher are compared.
        student_sampler: how the student is sampled in validation and export. Its guidance is
            best left at 1, as the student already holds the teacher's.
    """

    guidance_scale: float = field(default=5.0, validator=at_least(0, AWAY))
    guidance_scale_2: float | None = field(default=None, validator=optional(at_least(0, AWAY)))
    target: Literal["v", "x0"] = field(default="v", validator=in_(("v", "x0")))
    input: Literal["data", "student"] = field(default="data", validator=in_(("data", "student")))
    time: TimeSampling = field(default=TimeSampling(shift=5.0))
    student_sampler: SamplerSpec = field(
        default=SamplerSpec(steps=50, shift=5.0), validator=_unguided_rollout
    )

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        """Roles that are called."""
        return (STUDENT, *self.teacher_needs)

    @property
    def common_guidances(self) -> tuple[float, float | None]:
        return self.guidance_scale, self.guidance_scale_2

    def turns(self, iteration: int) -> tuple[str, ...]:
        """Roles that learn in ``iteration`` (1-based): always the student."""
        return ("student",)

    @property
    def needs_negative(self) -> bool:
        """Whether a step or the student's sampler needs a negative condition."""
        return self.teacher_guided or self.student_sampler.guided

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the adapter must be able to do."""
        return ("pred:v", *(("supports_cfg",) if self.needs_negative else ()))

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``."""
        return share(self.time, low, high)
