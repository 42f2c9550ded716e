"""Options of distribution matching. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from attrs import field, frozen
from attrs.validators import in_, optional
from distill_protocols import SamplerSpec
from distill_protocols.plugins import RoleNeed
from distill_protocols.validators import above, at_least, within

from distill_methods.roles import CRITIC, STUDENT, TEACHER
from distill_methods.time_ranges import share, share_of_levels
from distill_methods.time_sampling import TimeSampling

_SCALE = "t = 1000 sigma runs from 0 (clean) to 1000 (noise)"
_AWAY = "u + w (c - u) with w < 0 leads away from the prompt"
_TAKEN = (STUDENT.name, CRITIC.name)


def unguided(_config: Any, _: Any, value: SamplerSpec) -> None:
    """Validator of ``student_sampler`` where the student learns a guided teacher's clips."""
    if value.guided:
        w = next(w for w in value.guidances if w != 1)
        raise ValueError(
            f"guidance {w} must be 1: the student learns the guided teacher's clips "
            "and is called once a step, so guiding it again would show another model than the one "
            "trained. The teacher's guidance is real_score_guidance_scale."
        )


def _critic_has_a_turn(config: MatchingConfig, _: Any, value: int) -> None:
    if value == 1 and config.critic_update == "alternate":
        raise ValueError(
            "1 with critic_update: alternate leaves the critic no iteration, and a critic that "
            "never learns gives a wrong direction. Use at least 2, or critic_update: every_step."
        )


def _above_t_min(config: MatchingConfig, _: Any, value: float) -> None:
    if not value > config.score_t_min:
        raise ValueError(
            f"{value} must be above score_t_min ({config.score_t_min}): nothing lies between them"
        )


@frozen(kw_only=True)
class TeacherTerm:
    """One of several teachers.

    Attributes:
        weight: its part of the clean clip that the student is drawn to; all of them add up to 1.
            A negative one pushes away from what its teacher makes.
        guidance_scale: its w in ``u + w (c - u)``; left out, real_score_guidance_scale.
        guidance_scale_2: the same of its low-noise expert, where it has two; left out,
            ``guidance_scale``, or real_score_guidance_scale_2 where that is left out too.
    """

    weight: float
    guidance_scale: float | None = field(default=None, validator=optional(at_least(0, _AWAY)))
    guidance_scale_2: float | None = field(default=None, validator=optional(at_least(0, _AWAY)))


def _teachers(_config: Any, _: Any, value: Mapping[str, TeacherTerm]) -> None:
    total = sum(term.weight for term in value.values())
    if value and abs(total - 1) > 1e-6:
        raise ValueError(
            f"the weights ({', '.join(f'{n} {t.weight:g}' for n, t in value.items())}) add up to "
            f"{total:g} and must to 1: the weighted sum is a clean clip, and would be a scaled one"
        )
    for name in _TAKEN:
        if name in value:
            raise ValueError(f"{name!r} has a place of its own and can be no teacher; name another")


@frozen(kw_only=True)
class MatchingConfig:
    """What DMD2, Self-Forcing and CausVid have in common (Yin et al. 2024, "Improved
    Distribution Matching Distillation").

    Attributes:
        generator_update_interval: N: the student steps in every N-th iteration, first in the
            N-th.
        critic_update: alternate: the critic steps in the other N - 1 iterations (FastGen, rCM).
            every_step: it steps in all N (DMD2's own code, CausVid, Self-Forcing, FastVideo); a
            student iteration then holds both graphs in memory.
        real_score_guidance_scale: w of the teacher, ``u + w (c - u)``; 1 is conditional.
            CausVid, Self-Forcing and FastVideo's old code write ``c + s (c - u)``, which is
            w = s + 1: their 3.5 is 4.5 here, Self-Forcing's 3.0 is 4.0.
        real_score_guidance_scale_2: w of the teacher's expert for the low noise levels, where it
            has two; left out, the same.
        teachers: several teachers by role, in the place of the one role ``teacher``: the clean
            clip that the student is drawn to is the weighted sum of theirs.
        student_sampler: how the student is sampled, in the rollout as in validation and in the
            export. Write ``stochastic: true`` for the few-step sampler of the paper. Its
            guidance must be 1.
        score_shift: flow shift of the t at which teacher and critic judge a student's clip.
        score_t_min: lower clamp of that t: below, teacher and critic see no difference.
        score_t_max: upper clamp of that t: above, both see only noise.
        critic_time: the t at which the critic learns; left out: the same as the scores'.
    """

    generator_update_interval: int = field(
        default=5,
        validator=[at_least(1, "the student would never be updated"), _critic_has_a_turn],
    )
    critic_update: Literal["alternate", "every_step"] = field(
        default="alternate", validator=in_(("alternate", "every_step"))
    )
    real_score_guidance_scale: float = field(default=4.5, validator=at_least(0, _AWAY))
    real_score_guidance_scale_2: float | None = field(
        default=None, validator=optional(at_least(0, _AWAY))
    )
    teachers: Mapping[str, TeacherTerm] = field(
        factory=dict, converter=lambda given: MappingProxyType(dict(given)), validator=_teachers
    )
    student_sampler: SamplerSpec = field(
        default=SamplerSpec(steps=4, shift=5.0, stochastic=True), validator=unguided
    )
    score_shift: float = field(
        default=5.0,
        validator=above(0, "S_k(u) = k u / (1 + (k - 1) u) is a noise level for positive k only"),
    )
    score_t_min: float = field(default=20.0, validator=within(0, 1000, _SCALE))
    score_t_max: float = field(default=980.0, validator=[within(0, 1000, _SCALE), _above_t_min])
    critic_time: TimeSampling | None = None

    def turns(self, iteration: int) -> tuple[str, ...]:
        """Roles that learn in ``iteration`` (1-based): the whole update schedule."""
        student = iteration % self.generator_update_interval == 0
        if not student:
            return ("critic",)
        return ("student",) if self.critic_update == "alternate" else ("student", "critic")

    @property
    def needs(self) -> tuple[RoleNeed, ...]:
        """Roles that are called."""
        names = self.terms if self.teachers else (TEACHER.name,)
        teachers = (RoleNeed(name=n, trainable=False, help=TEACHER.help) for n in names)
        return (STUDENT, *teachers, CRITIC)

    @property
    def terms(self) -> Mapping[str, tuple[float, tuple[float, float]]]:
        """By teacher: its weight, and its w at high and at low noise levels."""
        ours = self.real_score_guidance_scale, self.real_score_guidance_scale_2
        given = self.teachers or {TEACHER.name: TeacherTerm(weight=1.0)}
        return {name: (term.weight, _guidances(term, *ours)) for name, term in given.items()}

    @property
    def guided(self) -> bool:
        """Whether a teacher is called with a negative condition."""
        return any(w != 1 for _, ws in self.terms.values() for w in ws)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the adapter must be able to do."""
        return ("pred:v", "pred:x0", *(("supports_cfg",) if self.guided else ()))

    @property
    def score_time(self) -> TimeSampling:
        """Distribution of the t at which teacher and critic judge."""
        return TimeSampling(shift=self.score_shift, t_min=self.score_t_min, t_max=self.score_t_max)

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodPlugin.update_share``."""
        if role == STUDENT.name:
            levels = [1000 * sigma for sigma in self.student_sampler.sigmas()]
            return share_of_levels(levels, low, high)
        return share(self.critic_time or self.score_time, low, high)


def _guidances(term: TeacherTerm, high: float, low: float | None) -> tuple[float, float]:
    own, own_low = term.guidance_scale, term.guidance_scale_2
    if own is not None:
        return own, own if own_low is None else own_low
    return high, _first(own_low, low, high)


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
