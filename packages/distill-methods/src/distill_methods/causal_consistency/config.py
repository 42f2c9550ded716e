"""Options of causal consistency distillation. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from attrs import field, frozen
from attrs.validators import in_, optional
from distill_protocols import ONE_TENSOR, HealthKind, PlannedRun, Problem, RoleNeed, SamplerSpec
from distill_protocols.validators import at_least

from distill_methods.consistency.config import Discrete, form_problems
from distill_methods.distribution_matching.config import is_unguided
from distill_methods.latent_config import can_be_left_early
from distill_methods.roles import STUDENT
from distill_methods.teachers.config import NEGATIVE_GUIDANCE, DefaultGuidance, TeachersConfig


@frozen(kw_only=True)
class CausalConsistencyConfig(TeachersConfig):
    """Consistency distillation of a causal student by a causal teacher, every chunk after a clean
    past (Causal-Forcing; FastVideo's ``causal_cd``).

    Attributes:
        guidance_scale: w of the teacher, ``u + w (c - u)``; it is fixed, and becomes part of the
            student, which is then called once.
        guidance_scale_2: w of the teacher's expert for the low noise levels, where it has two;
            left out, the same.
        teachers: several teachers by role, in the place of the one role ``teacher``; all are
            causal.
        discrete: the grid of times, and the distance of student and target.
        target: what predicts the target. ema: the average of the student's weights that
            ``callbacks.ema`` keeps. student: the student as it is, without gradient.
        student_sampler: how the student is sampled in validation and export; its guidance must be
            1. The past is noised to its ``context_noise``, as in sampling.
    """

    guidance_scale: float = field(default=3.0, validator=at_least(0, NEGATIVE_GUIDANCE))
    guidance_scale_2: float | None = field(
        default=None, validator=optional(at_least(0, NEGATIVE_GUIDANCE))
    )
    discrete: Discrete = field(default=Discrete(steps=48, shift=5.0, loss="l2"))
    target: Literal["ema", "student"] = field(default="ema", validator=in_(("ema", "student")))
    student_sampler: SamplerSpec = field(
        default=SamplerSpec(steps=4, shift=5.0, stochastic=True),
        validator=[is_unguided, can_be_left_early],
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
    def needs_negative(self) -> bool:
        """Whether a teacher is called with a negative condition."""
        return self.has_guided_teacher

    @property
    def health_metrics(self) -> Mapping[HealthKind, str]:
        """See ``MethodConfig.health_metrics``: none. The loss is a distance from a target that
        moves with the student, and rises where the student gets better."""
        return {}

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have. A teacher that saw later chunks would give a
        target that the student cannot know."""
        causal = (f"causal:{name}" for name in (STUDENT.name, *self.weighted_teachers))
        guided = ("supports_cfg",) if self.needs_negative else ()
        return ("pred:v", "pred:x0", ONE_TENSOR, "supports_teacher_forcing", *causal, *guided)

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``."""
        yield from super().problems(run)
        yield from form_problems(self.discrete, run)
        if self.target == "ema":
            for problem in run.role_problems(STUDENT.name, ema=True):
                yield Problem("target", f"ema: {problem.message}; or state target: student")

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``."""
        return self.discrete.probability_within(low, high)
