"""Options of LADD. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from attrs import field, frozen
from attrs.validators import in_
from distill_protocols import ONE_TENSOR, HealthKind, RoleNeed, SamplerSpec
from distill_protocols.validators import at_least

from distill_methods.adversarial.config import DiscriminatorOptions
from distill_methods.distribution_matching.config import is_unguided
from distill_methods.latent_config import (
    ROLLOUT_METRICS,
    LatentMethodConfig,
    RolloutSource,
    can_be_left_early,
)
from distill_methods.roles import DISCRIMINATOR, STUDENT, TEACHER, discriminator, roles_apart
from distill_methods.time_sampling import TimeSampling, fraction_within, probability_within


def _discriminator_has_a_turn(config: LaddConfig, _attribute: object, value: int) -> None:
    if value == 1 and config.discriminator_update == "alternate":
        raise ValueError(
            "1 with discriminator_update: alternate leaves the discriminator no iteration, and "
            "the student would learn from random heads. Use at least 2, or discriminator_update: "
            "every_step."
        )


@frozen(kw_only=True)
class LaddConfig(DiscriminatorOptions, LatentMethodConfig):
    """LADD (Sauer et al. 2024, "Fast High-Resolution Image Synthesis with Latent Adversarial
    Diffusion Distillation").

    Attributes:
        generator_update_interval: N: the student steps in every N-th iteration, first in the
            N-th.
        discriminator_update: alternate: the discriminator steps in the other N - 1 iterations
            (FastGen). every_step: in all N.
        rollout: data: the student's input is a noised clip of the data set (the paper, FastGen).
            simulate: it comes from the student's own sampling from noise.
        time: the t at which clips are noised before the teacher sees them. At low t the
            discriminator sees details, at high t the composition (the paper, section 3).
        student_sampler: how the student is sampled, in the rollout as in validation and in the
            export. Its guidance must be 1.
    """

    generator_update_interval: int = field(
        default=2,
        validator=[at_least(1, "the student would never be updated"), _discriminator_has_a_turn],
    )
    discriminator_update: Literal["alternate", "every_step"] = field(
        default="alternate", validator=in_(("alternate", "every_step"))
    )
    rollout: RolloutSource = field(default="data", validator=in_(get_args(RolloutSource)))
    time: TimeSampling = field(
        default=TimeSampling(distribution="logit_normal", mean=1.0, t_min=20.0, t_max=980.0)
    )
    student_sampler: SamplerSpec = field(
        default=SamplerSpec(steps=4, shift=5.0, stochastic=True),
        validator=[is_unguided, can_be_left_early],
    )

    @property
    def roles(self) -> tuple[RoleNeed, ...]:
        """Student, teacher, and the discriminator on the teacher."""
        return (STUDENT, TEACHER, discriminator(TEACHER.name))

    def turns(self, iteration: int) -> tuple[str, ...]:
        """Return the roles that step in ``iteration`` (1-based): the whole update schedule."""
        if iteration % self.generator_update_interval:
            return (DISCRIMINATOR,)
        alternates = self.discriminator_update == "alternate"
        return (STUDENT.name,) if alternates else (STUDENT.name, DISCRIMINATOR)

    def turns_apart(self, iteration: int) -> tuple[tuple[str, ...], ...]:
        """Return the discriminator and the student."""
        return roles_apart(self.turns(iteration), STUDENT.name)

    def metrics(self, iteration: int) -> tuple[str, ...]:
        """See ``MethodConfig.metrics``."""
        turns = self.turns(iteration)
        names = ["loss/total_loss", *ROLLOUT_METRICS]
        if DISCRIMINATOR in turns:
            names += self.discriminator_metrics
        if STUDENT.name in turns:
            names += ["loss/gan_generator_loss", "gan_fake_logit"]
        return tuple(dict.fromkeys(names))

    @property
    def health_metrics(self) -> Mapping[HealthKind, str]:
        """See ``MethodConfig.health_metrics``."""
        return {"student_std": "student_std", "discriminator_accuracy": "gan_accuracy"}

    @property
    def teacher_guidance(self) -> Mapping[str, tuple[float, float | None]]:
        """See ``MethodConfig.teacher_guidance``: the student comes near the data, not a guided
        teacher."""
        return {TEACHER.name: (1.0, None)}

    @property
    def capabilities(self) -> tuple[str, ...]:
        """Capabilities that the adapter must have."""
        return ("pred:v", "pred:x0", "supports_features", ONE_TENSOR)

    def rollout_times(self, low: float, high: float) -> tuple[float, ...]:
        """See ``LatentMethodConfig.rollout_times``."""
        return self.levels_until(low, high) if self.rollout == "simulate" else ()

    def update_share(self, role: str, low: float, high: float) -> float:
        """See ``MethodConfig.update_share``."""
        if role == STUDENT.name:
            return fraction_within(self.student_levels, low, high)
        return probability_within(self.time, low, high)
