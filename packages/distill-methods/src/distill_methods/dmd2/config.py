"""Options of DMD2. No torch here: run files are checked without it."""

from __future__ import annotations

from typing import Any, Literal

from attrs import field, frozen
from attrs.validators import in_
from distill_protocols import SamplerSpec
from distill_protocols.validators import above, at_least, within

from distill_methods.time_sampling import TimeSampling

_SCALE = "t = 1000 sigma runs from 0 (clean) to 1000 (noise)"


def _critic_has_a_turn(config: DMD2Config, _: Any, value: int) -> None:
    if value == 1 and config.critic_update == "alternate":
        raise ValueError(
            "1 with critic_update: alternate leaves the critic no iteration, and a critic that "
            "never learns gives a wrong direction. Use at least 2, or critic_update: every_step."
        )


def _unguided(_config: DMD2Config, _: Any, value: SamplerSpec) -> None:
    if value.guided:
        w = next(w for w in value.guidances if w != 1)
        raise ValueError(
            f"guidance {w} must be 1: the student learns the guided teacher's clips "
            "and is called once a step, so guiding it again would show another model than the one "
            "trained. The teacher's guidance is real_score_guidance_scale."
        )


def _above_t_min(config: DMD2Config, _: Any, value: float) -> None:
    if not value > config.score_t_min:
        raise ValueError(
            f"{value} must be above score_t_min ({config.score_t_min}): nothing lies between them"
        )


@frozen(kw_only=True)
class DMD2Config:
    """DMD2 (Yin et al. 2024, "Improved Distribution Matching Distillation").

    Attributes:
        generator_update_interval: N: the student steps in every N-th iteration, first in the
            N-th.
        critic_update: alternate: the critic steps in the other N - 1 iterations (FastGen, rCM).
            every_step: it steps in all N (DMD2's own code, CausVid, Self-Forcing, FastVideo); a
            student iteration then holds both graphs in memory.
        real_score_guidance_scale: w of the teacher, ``u + w (c - u)``; 1 is conditional.
            CausVid, Self-Forcing and FastVideo's old code write ``c + s (c - u)``, which is
            w = s + 1: their 3.5 is 4.5 here, Self-Forcing's 3.0 is 4.0.
        rollout: simulate: the student's input comes from its own sampling from noise (DMD2's
            backward simulation), so training sees what sampling sees, and needs no data but
            captions. data: it is a noised clip of the data set (FastGen, CausVid).
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
    real_score_guidance_scale: float = field(
        default=4.5, validator=at_least(0, "u + w (c - u) with w < 0 leads away from the prompt")
    )
    rollout: Literal["simulate", "data"] = field(
        default="simulate", validator=in_(("simulate", "data"))
    )
    student_sampler: SamplerSpec = field(
        default=SamplerSpec(steps=4, shift=5.0, stochastic=True), validator=_unguided
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
    def guided(self) -> bool:
        """Whether the teacher is called with a negative condition."""
        return self.real_score_guidance_scale != 1

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the adapter must be able to do."""
        return ("pred:v", "pred:x0", *(("supports_cfg",) if self.guided else ()))

    @property
    def score_time(self) -> TimeSampling:
        """Distribution of the t at which teacher and critic judge."""
        return TimeSampling(shift=self.score_shift, t_min=self.score_t_min, t_max=self.score_t_max)
