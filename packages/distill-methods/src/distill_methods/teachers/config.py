"""One frozen teacher or several, each with its guidance. No torch here: run files are checked
without it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from attrs import field, frozen
from attrs.validators import optional
from distill_protocols import PlannedRun, Problem, RoleNeed
from distill_protocols.validators import at_least

from distill_methods.latent_config import LatentMethodConfig
from distill_methods.roles import CRITIC, DISCRIMINATOR, STUDENT, TEACHER

NEGATIVE_GUIDANCE = "u + w (c - u) with w < 0 leads away from the prompt"
_RESERVED = (STUDENT.name, CRITIC.name, DISCRIMINATOR)


class ExpertGuidance(NamedTuple):
    """w of a teacher: at high noise levels, and at low ones, where a second expert has its own."""

    high_noise: float
    low_noise: float


class WeightedTeacher(NamedTuple):
    """Weight of one teacher in the sum, and the guidance that it is called with."""

    weight: float
    guidance: ExpertGuidance


class DefaultGuidance(NamedTuple):
    """Guidance of the teachers that state none of their own.

    Attributes:
        scale: w; of both experts, unless ``low_noise_scale`` is stated.
        low_noise_scale: w of the expert for low noise levels; None: ``scale``.
        low_noise_option: name of the option that states it.
    """

    scale: float
    low_noise_scale: float | None
    low_noise_option: str


@frozen(kw_only=True)
class TeacherTerm:
    """One of several teachers.

    Attributes:
        weight: its weight in the sum of predictions that the student learns from; all weights add
            up to 1. A negative one leads away from what this teacher makes.
        guidance_scale: its w in ``u + w (c - u)``; left out, the method's.
        guidance_scale_2: the same of its low-noise expert, where it has two; left out,
            ``guidance_scale``, or the method's where that is left out too.
    """

    weight: float
    guidance_scale: float | None = field(
        default=None, validator=optional(at_least(0, NEGATIVE_GUIDANCE))
    )
    guidance_scale_2: float | None = field(
        default=None, validator=optional(at_least(0, NEGATIVE_GUIDANCE))
    )


def _as_frozen_mapping(teachers: Mapping[str, TeacherTerm]) -> Mapping[str, TeacherTerm]:
    return MappingProxyType(dict(teachers))


def _are_teachers(_config: object, _attribute: object, teachers: Mapping[str, TeacherTerm]) -> None:
    total = sum(term.weight for term in teachers.values())
    if teachers and not abs(total - 1) <= 1e-6:  # "not <=" refuses nan as well.
        weights = ", ".join(f"{name} {term.weight:g}" for name, term in teachers.items())
        raise ValueError(
            f"the weights ({weights}) add up to {total:g} and must to 1: the weighted sum is a "
            "clean clip, and would be a scaled one"
        )
    for name in _RESERVED:
        if name in teachers:
            raise ValueError(
                f"{name!r} is a role that the method itself gives a meaning and can be no teacher; "
                "name the teacher otherwise"
            )


@frozen(kw_only=True)
class TeachersConfig(LatentMethodConfig):
    """Base of the configs of methods with frozen teachers. A subclass states
    ``default_guidance``, as the methods name their guidance options differently.

    Attributes:
        teachers: several teachers by role, in the place of the one role ``teacher``: what the
            student learns from is the weighted sum of their predictions.
    """

    teachers: Mapping[str, TeacherTerm] = field(
        factory=dict, converter=_as_frozen_mapping, validator=_are_teachers
    )

    @property
    @abstractmethod
    def default_guidance(self) -> DefaultGuidance:
        """Guidance of the teachers that state none of their own."""

    @property
    def weighted_teachers(self) -> Mapping[str, WeightedTeacher]:
        """Weight and guidance of each teacher, by role."""
        return {
            name: WeightedTeacher(term.weight, self._guidance_of(term))
            for name, term in self._terms.items()
        }

    @property
    def teacher_roles(self) -> tuple[RoleNeed, ...]:
        """The frozen roles, for ``roles``."""
        return tuple(
            RoleNeed(name=name, trainable=False, help=TEACHER.help) for name in self._terms
        )

    @property
    def teacher_guidance(self) -> Mapping[str, tuple[float, float | None]]:
        """See ``MethodConfig.teacher_guidance``: of the teachers that the student is led to."""
        return {
            name: (
                teacher.guidance.high_noise,
                None
                if teacher.guidance.low_noise == teacher.guidance.high_noise
                else teacher.guidance.low_noise,
            )
            for name, teacher in self.weighted_teachers.items()
            if teacher.weight > 0
        }

    @property
    def has_guided_teacher(self) -> bool:
        """Whether a teacher is called with a negative condition."""
        return any(w != 1 for t in self.weighted_teachers.values() for w in t.guidance)

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``."""
        yield from super().problems(run)
        yield from self.teacher_problems(run.single)

    def teacher_problems(self, single_expert_roles: Collection[str]) -> Iterator[Problem]:
        """Yield each guidance of a low-noise expert that no teacher has."""
        default = self.default_guidance
        defaulting = [
            name
            for name, term in self._terms.items()
            if term.guidance_scale is None and term.guidance_scale_2 is None
        ]
        is_unused = all(name in single_expert_roles for name in defaulting)
        if default.low_noise_scale is not None and is_unused:
            who = " or ".join(map(repr, defaulting)) or "no teacher"
            yield Problem(
                default.low_noise_option, _unused_guidance_message(default.low_noise_scale, who)
            )
        for name, term in self.teachers.items():
            if term.guidance_scale_2 is not None and name in single_expert_roles:
                yield Problem(
                    ("teachers", name, "guidance_scale_2"),
                    _unused_guidance_message(term.guidance_scale_2, repr(name)),
                )

    @property
    def _terms(self) -> Mapping[str, TeacherTerm]:
        return self.teachers or {TEACHER.name: TeacherTerm(weight=1.0)}

    def _guidance_of(self, term: TeacherTerm) -> ExpertGuidance:
        # A teacher's own guidance_scale is of both its experts; the method's two scales are a pair.
        high, low = term.guidance_scale, term.guidance_scale_2
        default_low: float | None = None
        if high is None:
            high, default_low = self.default_guidance.scale, self.default_guidance.low_noise_scale
        if low is None:
            low = high if default_low is None else default_low
        return ExpertGuidance(high, low)


def _unused_guidance_message(w: float, who: str) -> str:
    return (
        f"{w:g} is the guidance of a second expert, for low noise levels, and would never be "
        f"used: {who} has one expert. Leave it out"
    )
