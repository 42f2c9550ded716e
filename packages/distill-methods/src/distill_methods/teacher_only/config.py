"""Options of teacher-only distillation. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from attrs import Attribute, field, frozen
from attrs.validators import in_, optional
from distill_protocols import HealthKind, RoleNeed, SamplerSpec
from distill_protocols.validators import at_least

from distill_methods.latent_config import can_be_left_early
from distill_methods.roles import STUDENT
from distill_methods.teachers.config import NEGATIVE_GUIDANCE, DefaultGuidance, TeachersConfig
from distill_methods.time_sampling import TimeSampling, probability_within


def _can_be_rolled_out(
    config: TeacherOnlyConfig, attribute: Attribute[Any], value: SamplerSpec
) -> None:
    if config.input == "data":
        return
    can_be_left_early(config, attribute, value)
    if value.guided:
        w = next(w for w in value.guidances if w != 1)
        raise ValueError(
            f"guidance {w} must be 1 with input: student, whose clips are the student's own: "
            "guiding it would give other clips than it is trained to make. Leave it out"
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
        target: v: the loss is on v, and every t counts alike. x0: the loss is on the clean clips,
            which is that on v times sigma^2: noisy clips count most.
        input: data: student and teacher are compared at noised clips of the data set. student: at
            noised clips that the student itself samples by ``student_sampler`` (all its steps,
            without gradient): there sampling will call it, and no data but captions are needed.
        time: the t at which student and teacher are compared.
        student_sampler: how the student is sampled in validation and export. Its guidance is
            best left at 1, as the student already holds the teacher's.
    """

    guidance_scale: float = field(default=5.0, validator=at_least(0, NEGATIVE_GUIDANCE))
    guidance_scale_2: float | None = field(
        default=None, validator=optional(at_least(0, NEGATIVE_GUIDANCE))
    )
    target: Literal["v", "x0"] = field(default="v", validator=in_(("v", "x0")))
    input: Literal["data", "student"] = field(default="data", validator=in_(("data", "student")))
    time: TimeSampling = field(default=TimeSampling(shift=5.0))
    student_sampler: SamplerSpec = field(
        default=SamplerSpec(steps=50, shift=5.0), validator=_can_be_rolled_out
    )

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        """Student and teachers."""
        return (STUDENT, *self.teacher_roles)

    @property
    def default_guidance(self) -> DefaultGuidance:
        """See ``TeachersConfig.default_guidance``."""
        return DefaultGuidance(self.guidance_scale, self.guidance_scale_2, "guidance_scale_2")

    @property
    def needs_latents(self) -> bool:
        """Whether clips of the data are noised."""
        return self.input == "data"

    @property
    def needs_negative(self) -> bool:
        """Whether a step or the student's sampler needs a negative condition."""
        return self.has_guided_teacher or self.student_sampler.guided

    @property
    def health_metrics(self) -> Mapping[HealthKind, str]:
        """See ``MethodConfig.health_metrics``: the loss is a distance from what is learned."""
        return {"student_loss": "loss/total_loss"}

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        return ("pred:v", *(("supports_cfg",) if self.needs_negative else ()))

    def rollout_times(self, low: float, high: float) -> tuple[float, ...]:
        """See ``LatentMethodConfig.rollout_times``: all steps are taken."""
        return self.student_levels if self.input == "student" else ()

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``."""
        return probability_within(self.time, low, high)
