"""Options of distribution matching. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import Literal, Self, get_args

from attrs import Attribute, evolve, field, frozen
from attrs.validators import in_, optional
from distill_protocols import (
    ONE_TENSOR,
    ExitSpec,
    HealthKind,
    PlannedRun,
    Problem,
    RoleNeed,
    SamplerSpec,
)
from distill_protocols.validators import above, at_least, within

from distill_methods.adversarial.config import FDivergence, GanConfig
from distill_methods.exits import ExitChoice, exit_choice_problem, exit_weights, weight_within
from distill_methods.latent_config import ROLLOUT_METRICS, can_be_left_early
from distill_methods.roles import CRITIC, DISCRIMINATOR, STUDENT, discriminator, roles_apart
from distill_methods.teachers.config import NEGATIVE_GUIDANCE, DefaultGuidance, TeachersConfig
from distill_methods.time_sampling import TimeLimits, TimeSampling, probability_within

Guidances = tuple[float, ...]
"""w for each exit step."""

CriticLoss = Literal["v", "x0", "eps"]
"""Which of the critic's predictions its squared error is of."""

GUIDED = 2.0
"""A guidance that every model which reads a negative condition reads it for."""

NO_NEGATIVE = (
    "{} replaces conditions by the negative one, and there is none, as guidance is an input of "
    "these models. Leave it out"
)

_SCALE = "t = 1000 sigma runs from 0 (clean) to 1000 (noise)"


def is_unguided(_config: object, _attribute: object, value: SamplerSpec) -> None:
    """Validate ``student_sampler`` of a student that learns a guided teacher's clips."""
    if value.guided:
        w = next(w for w in value.guidances if w != 1)
        raise ValueError(
            f"guidance {w} must be 1: the student learns the guided teacher's clips "
            "and is called once a step, so guiding it again would show another model than the one "
            "trained. The teacher's guidance is another option of the method."
        )


def _critic_has_a_turn(config: MatchingConfig, _attribute: object, value: int) -> None:
    if value == 1 and config.critic_update == "alternate":
        raise ValueError(
            "1 with critic_update: alternate leaves the critic no iteration, and a critic that "
            "never learns gives a wrong direction. Use at least 2, or critic_update: every_step."
        )


def _is_above_t_min(config: MatchingConfig, _attribute: object, value: float) -> None:
    if not value > config.score_t_min:
        raise ValueError(
            f"{value} must be above score_t_min ({config.score_t_min}): nothing lies between them"
        )


def _is_a_score_time(config: MatchingConfig, _attribute: object, value: TimeLimits) -> None:
    TimeSampling(  # which says what is wrong with these limits
        shift=config.score_shift,
        t_min=config.score_t_min,
        t_max=config.score_t_max,
        limits=value,
    )


def _is_an_exit_choice(config: MatchingConfig, _attribute: object, value: ExitChoice) -> None:
    if problem := exit_choice_problem(value, config.student_sampler.steps):
        raise ValueError(problem)


def _knows_several_exits(config: MatchingConfig, _attribute: object, value: bool) -> None:
    if value and config.trained_exits == 1:
        raise ValueError(
            "true has no effect: all clips of the student leave its sampler at the same step, so "
            "there is nothing to tell the critic. Leave it out"
        )


def _is_guidance(config: MatchingConfig, attribute: object, value: float | Guidances) -> None:
    for w in value if isinstance(value, tuple) else (value,):
        at_least(0, NEGATIVE_GUIDANCE)(config, attribute, w)
    if isinstance(value, tuple) and len(value) != config.student_sampler.steps:
        raise ValueError(
            f"{list(value)} has {len(value)} numbers, and student_sampler takes "
            f"{config.student_sampler.steps} steps. Give one for each exit step, or one for all"
        )


def _is_guidance_of_the_critic(config: MatchingConfig, _attribute: object, value: float) -> None:
    if value == 1:
        return
    if not config.critic_condition_dropout:
        raise ValueError(
            f"{value} guides the critic by what it predicts under the negative condition, which it "
            "never learns. Set critic_condition_dropout, 0.1 say, or leave this at 1"
        )
    if config.critic_exits:
        raise ValueError(
            f"{value} cannot be used with critic_exits: a critic that is told the exit is called "
            "without guidance. Leave one of them out"
        )


def _has_a_density_ratio(config: MatchingConfig, _attribute: object, value: FDivergence) -> None:
    if value == "reverse_kl":
        return
    if config.gan is None:
        raise ValueError(
            f"{value} weights each sample by its density ratio, which only a discriminator can "
            "estimate. Set gan ({} has its defaults; generator_weight: 0 for the ratio alone), or "
            "use reverse_kl"
        )
    if config.gan.time is not None:
        raise ValueError(
            f"{value} needs the density ratio at the x_t of the scores, and with gan.time D reads "
            "others. Leave gan.time out"
        )


def _are_ratio_limits(
    config: MatchingConfig, attribute: Attribute[tuple[float, float]], value: tuple[float, float]
) -> None:
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
    """Options of every method that matches distributions: DMD2, Self-Forcing, CausVid, rCM (Yin et
    al. 2024, "Improved Distribution Matching Distillation").

    Attributes:
        generator_update_interval: N: the student steps in every N-th iteration, first in the
            N-th.
        critic_update: alternate: the critic steps in the other N - 1 iterations (FastGen, rCM).
            every_step: it steps in all N (DMD2's own code, CausVid, Self-Forcing, FastVideo); a
            student iteration then holds both graphs in memory.
        exit: at which step of its sampler the student is trained. uniform: at all alike. last: at
            the last alone. Or a weight for each step, such as ``[1, 3]``.
        critic_exits: the critic is told at which step each clip left the sampler, by a learned
            embedding that is zero at first. Without it the critic learns the mixture of all steps'
            clips, whose spread the last step pays for.
        real_score_guidance_scale: w of the teacher, ``u + w (c - u)``; 1 is conditional. A list has
            one for each exit step, for use with ``critic_exits``.
            CausVid, Self-Forcing and FastVideo's old code write ``c + s (c - u)``, which is
            w = s + 1: their 3.5 is 4.5 here, Self-Forcing's 3.0 is 4.0.
        real_score_guidance_scale_2: w of the teacher's expert for the low noise levels, where it
            has two; left out, the same.
        fake_score_guidance_scale: w of the critic's score in the student's turn (DMD2's
            ``fake_guidance_scale``). Any but 1 needs ``critic_condition_dropout``.
        critic_condition_dropout: chance that the critic learns a clip under the negative condition.
        teachers: several teachers by role, in the place of the one role ``teacher``: the clean
            clip that the student is led to is the weighted sum of theirs.
        student_sampler: how the student is sampled, in the rollout as in validation and in the
            export. Write ``stochastic: true`` for the few-step sampler of the paper. Its
            guidance must be 1.
        score_shift: flow shift of the t at which teacher and critic predict a student's clip.
        score_t_min: lower limit of that t: below, teacher and critic see no difference.
        score_t_max: upper limit of that t: above, both see only noise.
        score_t_limits: clamp: what lies beyond them becomes the limit itself. truncate: only t
            between them are drawn.
        critic_time: the t at which the critic is trained; left out: the same as the scores'.
        critic_loss: what the critic's squared error is of. v: flow matching (Self-Forcing,
            FastVideo). x0: its error times s^2 (FastGen), so that low noise counts little. eps:
            times (1 - s)^2 (DMD2's own code), so that high noise does.
        gan: a discriminator whose loss is added to the student's, or whose density ratio weights
            the student's gradient; left out: none.
        f_divergence: which divergence of student and teacher is minimised (f-distill, Xu et al.
            2025): any but the reverse KL, which is DMD's, multiplies a sample's gradient by h(r),
            r = p_data / p_student as D estimates it. Needs ``gan``.
        f_ratio_limits: limits that r is clamped to.
    """

    generator_update_interval: int = field(
        default=5,
        validator=[at_least(1, "the student would never be updated"), _critic_has_a_turn],
    )
    critic_update: Literal["alternate", "every_step"] = field(
        default="alternate", validator=in_(("alternate", "every_step"))
    )
    exit: ExitChoice = field(default="uniform", validator=_is_an_exit_choice)
    critic_exits: bool = field(default=False, validator=_knows_several_exits)
    real_score_guidance_scale: float | Guidances = field(default=4.5, validator=_is_guidance)
    real_score_guidance_scale_2: float | None = field(
        default=None, validator=optional(at_least(0, NEGATIVE_GUIDANCE))
    )
    critic_condition_dropout: float = field(
        default=0.0, validator=within(0, 1, "it is the chance of each clip")
    )
    fake_score_guidance_scale: float = field(
        default=1.0, validator=[at_least(0, NEGATIVE_GUIDANCE), _is_guidance_of_the_critic]
    )
    student_sampler: SamplerSpec = field(
        default=SamplerSpec(steps=4, shift=5.0, stochastic=True),
        validator=[is_unguided, can_be_left_early],
    )
    score_shift: float = field(
        default=5.0,
        validator=above(0, "S_k(u) = k u / (1 + (k - 1) u) is a noise level for positive k only"),
    )
    score_t_min: float = field(default=20.0, validator=within(0, 1000, _SCALE))
    score_t_max: float = field(default=980.0, validator=[within(0, 1000, _SCALE), _is_above_t_min])
    score_t_limits: TimeLimits = field(
        default="clamp", validator=[in_(get_args(TimeLimits)), _is_a_score_time]
    )
    critic_time: TimeSampling | None = None
    critic_loss: CriticLoss = field(default="v", validator=in_(get_args(CriticLoss)))
    gan: GanConfig | None = None
    f_divergence: FDivergence = field(
        default="reverse_kl", validator=[in_(get_args(FDivergence)), _has_a_density_ratio]
    )
    f_ratio_limits: tuple[float, float] = field(default=(0.1, 20.0), validator=_are_ratio_limits)

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        """Student, teachers and critic, and with ``gan`` the discriminator."""
        discriminators = () if self.gan is None else (discriminator(*self.feature_roles),)
        critic = evolve(CRITIC, exits=self.told_exits)
        return (STUDENT, *self.teacher_roles, critic, *discriminators)

    @property
    def exit_weights(self) -> tuple[float, ...]:
        """See ``LatentMethodConfig.exit_weights``."""
        return exit_weights(self.exit, self.student_sampler.steps)

    @property
    def trained_exits(self) -> int:
        """How many of the steps are the exit now and then."""
        return sum(weight > 0 for weight in self.exit_weights)

    @property
    def told_exits(self) -> ExitSpec | None:
        """The exit steps that the critic is told; None: none."""
        return ExitSpec(count=self.student_sampler.steps) if self.critic_exits else None

    @property
    def by_exit(self) -> tuple[Self, ...]:
        """This config with one guidance: for each exit step, or one for all of them."""
        if not isinstance(self.real_score_guidance_scale, tuple):
            return (self,)
        return tuple(
            evolve(self, real_score_guidance_scale=w) for w in self.real_score_guidance_scale
        )

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``."""
        yield from super().problems(run)
        if self.critic_condition_dropout and not run.reads_negative(GUIDED):
            yield Problem(
                "critic_condition_dropout", NO_NEGATIVE.format(self.critic_condition_dropout)
            )

    def turns(self, iteration: int) -> tuple[str, ...]:
        """Return the roles that step in ``iteration`` (1-based): the whole update schedule."""
        critic = (CRITIC.name,) if self.gan is None else (CRITIC.name, DISCRIMINATOR)
        if iteration % self.generator_update_interval:
            return critic
        return (STUDENT.name,) if self.critic_update == "alternate" else (STUDENT.name, *critic)

    def turns_apart(self, iteration: int) -> tuple[tuple[str, ...], ...]:
        """Return the critic, with the discriminator, and the student."""
        return roles_apart(self.turns(iteration), STUDENT.name)

    def metrics(self, iteration: int) -> tuple[str, ...]:
        """See ``MethodConfig.metrics``."""
        turns = self.turns(iteration)
        names = ["loss/total_loss", *ROLLOUT_METRICS]
        if CRITIC.name in turns:
            names += ["loss/critic_loss", *(self.gan.discriminator_metrics if self.gan else ())]
        if STUDENT.name in turns:
            names += ["loss/dmd_loss", "dmd_normaliser", "dmd_gradient_rms", "score_distance"]
            if self.gan is not None:
                names += ["loss/gan_generator_loss", "gan_fake_logit"]
            if self.f_divergence != "reverse_kl":
                names += ["f_weight_mean", "f_weight_min", "f_weight_max"]
        return tuple(dict.fromkeys(names))

    @property
    def health_metrics(self) -> Mapping[HealthKind, str]:
        """See ``MethodConfig.health_metrics``."""
        metrics: dict[HealthKind, str] = {
            "matching_loss": "loss/dmd_loss",
            "critic_loss": "loss/critic_loss",
            "student_std": "student_std",
            "normaliser": "dmd_normaliser",
            "score_distance": "score_distance",
        }
        if self.gan is not None:
            metrics["discriminator_accuracy"] = "gan_accuracy"
        return metrics

    @property
    def feature_roles(self) -> tuple[str, ...]:
        """Roles that the discriminator may be heads on."""
        trains_features = self.gan is not None and self.gan.train_features
        return (CRITIC.name,) if trains_features else (*self.weighted_teachers, CRITIC.name)

    @property
    def default_guidance(self) -> DefaultGuidance:
        """See ``TeachersConfig.default_guidance``: of several, that of the last exit step, whose
        clips are those that sampling makes."""
        w = self.real_score_guidance_scale
        return DefaultGuidance(
            w[-1] if isinstance(w, tuple) else w,
            self.real_score_guidance_scale_2,
            "real_score_guidance_scale_2",
        )

    @property
    def needs_negative(self) -> bool:
        """Whether a teacher or the critic is called with a negative condition."""
        if self.critic_condition_dropout:
            return True
        return any(config.has_guided_teacher for config in self.by_exit)

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        optional_names = {
            "supports_cfg": self.needs_negative,
            "supports_features": self.gan is not None,
            ONE_TENSOR: self.gan is not None or self.critic_exits,
            "supports_exits": self.critic_exits,
        }
        return ("pred:v", "pred:x0", *(name for name, needed in optional_names.items() if needed))

    @property
    def score_time(self) -> TimeSampling:
        """Distribution of the t at which teacher and critic predict the student's clips."""
        return TimeSampling(
            shift=self.score_shift,
            t_min=self.score_t_min,
            t_max=self.score_t_max,
            limits=self.score_t_limits,
        )

    @property
    def gan_time(self) -> TimeSampling:
        """Distribution of the t at which the discriminator reads clips."""
        return (self.gan and self.gan.time) or self.score_time

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``."""
        if role == STUDENT.name:
            return weight_within(self.student_levels, self.exit_weights, low, high)
        of_score = probability_within(self.critic_time or self.score_time, low, high)
        if role != CRITIC.name or self.gan is None or not self.gan.train_features:
            return of_score
        # Two losses train it, each at a t of its own: the probability that one of them is inside.
        return 1 - (1 - of_score) * (1 - probability_within(self.gan_time, low, high))
