"""Options of distribution matching. No torch here: run files are checked without it."""

from __future__ import annotations

from math import inf
from typing import Any, Literal, get_args

from attrs import field, frozen
from attrs.validators import in_, optional
from distill_protocols import RoleNeed, SamplerSpec
from distill_protocols.validators import above, at_least, within

from distill_methods.adversarial.config import FDivergence, GanConfig
from distill_methods.roles import CRITIC, DISCRIMINATOR, STUDENT, discriminator
from distill_methods.teachers import AWAY, TeachersConfig
from distill_methods.time_ranges import share, share_of_levels
from distill_methods.time_sampling import TimeSampling

_SCALE = "t = 1000 sigma runs from 0 (clean) to 1000 (noise)"


def unguided(_config: Any, _: Any, value: SamplerSpec) -> None:
    """Validator of ``student_sampler`` where the student learns a guided teacher's clips."""
    if value.guided:
        w = next(w for w in value.guidances if w != 1)
        raise ValueError(
            f"guidance {w} must be 1: the student learns the guided teacher's clips "
            "and is called once a step, so guiding it again would show another model than the one "
            "trained. The teacher's guidance is an option of its own of the method."
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


def _ratio_is_known(config: MatchingConfig, _: Any, value: FDivergence) -> None:
    if value == "reverse_kl":
        return
    if config.gan is None:
        raise ValueError(
            f"{value} weights each sample by its density ratio, which only a discriminator can "
            "tell. Set gan ({} has its defaults; generator_weight: 0 for the ratio alone), or use "
            "reverse_kl"
        )
    if config.gan.time is not None:
        raise ValueError(
            f"{value} needs the density ratio at the x_t of the scores, and gan.time has D look at "
            "others. Leave gan.time out"
        )


def _limits(config: MatchingConfig, attribute: Any, value: tuple[float, float]) -> None:
    low, high = value
    if not 0 < low <= 1 <= high < inf:
        raise ValueError(
            f"[{low}, {high}] must be positive and hold 1, the ratio where data and student are "
            "equally likely; [0.1, 20] is FastGen's"
        )
    if config.f_divergence == "reverse_kl" and value != attribute.default:
        raise ValueError(
            f"[{low}, {high}] has no effect: the reverse KL weights all samples alike. Set "
            "f_divergence, or leave this out"
        )


@frozen(kw_only=True)
class MatchingConfig(TeachersConfig):
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
        gan: a discriminator that the student must deceive as well, or whose word weights its
            gradient; left out: none.
        f_divergence: of student from teacher (f-distill, Xu et al. 2025): another than the reverse
            KL, which is DMD's, multiplies a sample's gradient by h(r), r = p_data / p_student as D
            has it. Needs ``gan``.
        f_ratio_limits: r is kept within these.
    """

    generator_update_interval: int = field(
        default=5,
        validator=[at_least(1, "the student would never be updated"), _critic_has_a_turn],
    )
    critic_update: Literal["alternate", "every_step"] = field(
        default="alternate", validator=in_(("alternate", "every_step"))
    )
    real_score_guidance_scale: float = field(default=4.5, validator=at_least(0, AWAY))
    real_score_guidance_scale_2: float | None = field(
        default=None, validator=optional(at_least(0, AWAY))
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
    gan: GanConfig | None = None
    f_divergence: FDivergence = field(
        default="reverse_kl", validator=[in_(get_args(FDivergence)), _ratio_is_known]
    )
    f_ratio_limits: tuple[float, float] = field(default=(0.1, 20.0), validator=_limits)

    def turns(self, iteration: int) -> tuple[str, ...]:
        """Roles that learn in ``iteration`` (1-based): the whole update schedule."""
        student = iteration % self.generator_update_interval == 0
        follow = (CRITIC.name,) if self.gan is None else (CRITIC.name, DISCRIMINATOR)
        if not student:
            return follow
        return ("student",) if self.critic_update == "alternate" else ("student", *follow)

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        """Roles that are called."""
        heads = () if self.gan is None else (discriminator(*self.features_of),)
        return (STUDENT, *self.teacher_needs, CRITIC, *heads)

    @property
    def features_of(self) -> tuple[str, ...]:
        """Roles that a discriminator may be heads on."""
        trains = self.gan is not None and self.gan.train_features
        return (CRITIC.name,) if trains else (*self.terms, CRITIC.name)

    @property
    def guidance_keys(self) -> tuple[str, str]:
        return "real_score_guidance_scale", "real_score_guidance_scale_2"

    @property
    def common_guidances(self) -> tuple[float, float | None]:
        return self.real_score_guidance_scale, self.real_score_guidance_scale_2

    @property
    def needs_negative(self) -> bool:
        """Whether a teacher is called with a negative condition."""
        return self.teacher_guided

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the adapter must be able to do."""
        also = {"supports_cfg": self.needs_negative, "supports_features": self.gan is not None}
        return ("pred:v", "pred:x0", *(name for name, needed in also.items() if needed))

    @property
    def score_time(self) -> TimeSampling:
        """Distribution of the t at which teacher and critic judge."""
        return TimeSampling(shift=self.score_shift, t_min=self.score_t_min, t_max=self.score_t_max)

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``."""
        if role == STUDENT.name:
            levels = [1000 * sigma for sigma in self.student_sampler.sigmas()]
            return share_of_levels(levels, low, high)
        own = share(self.critic_time or self.score_time, low, high)
        if role != CRITIC.name or self.gan is None or not self.gan.train_features:
            return own
        # It learns from either loss, each at a t of its own.
        return 1 - (1 - own) * (1 - share(self.gan_time, low, high))

    @property
    def gan_time(self) -> TimeSampling:
        """Distribution of the t at which the discriminator judges."""
        own = None if self.gan is None else self.gan.time
        return own or self.score_time
