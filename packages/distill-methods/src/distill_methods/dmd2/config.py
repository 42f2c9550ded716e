"""Options of DMD2. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self, get_args

from attrs import evolve, field, frozen
from attrs.validators import in_
from distill_protocols import PlannedRun, Problem

from distill_methods.distribution_matching.whole_clips import WholeClipConfig
from distill_methods.latent_config import RolloutSource
from distill_methods.time_sampling import TimeSampling


def _has_guidance_to_decouple(config: DMD2Config, _attribute: object, value: bool) -> None:
    if not value:
        return
    if not any(one.has_guided_teacher for one in config.by_exit):
        raise ValueError(
            "true has no effect: no teacher is guided, so there is nothing to decouple from the "
            "matching. Set real_score_guidance_scale, or leave it out"
        )
    if config.rollout == "data":
        raise ValueError(
            "true needs rollout: simulate, in which all clips of a micro batch leave the sampler "
            "at one step, whose t is the limit of the guidance's. Leave one of the two out"
        )


@frozen(kw_only=True)
class DMD2Config(WholeClipConfig):
    """DMD2 (Yin et al. 2024, "Improved Distribution Matching Distillation").

    Attributes:
        rollout: simulate: the student's input comes from its own sampling from noise (DMD2's
            backward simulation), so training sees what sampling sees, and needs no data but
            captions. data: it is a noised clip of the data set (FastGen, CausVid).
        decoupled: what guidance adds to the direction is taken at a noise level of its own, below
            that of the step which made the clip (Decoupled DMD, Liu et al. 2025).
    """

    rollout: RolloutSource = field(default="simulate", validator=in_(get_args(RolloutSource)))
    decoupled: bool = field(default=False, validator=_has_guidance_to_decouple)

    @property
    def unguided(self) -> Self:
        """This config with teachers that are called on the condition alone."""
        teachers = {
            name: evolve(term, guidance_scale=None, guidance_scale_2=None)
            for name, term in self.teachers.items()
        }
        return evolve(
            self,
            decoupled=False,
            real_score_guidance_scale=1.0,
            real_score_guidance_scale_2=None,
            teachers=teachers,
        )

    def augmentation_times(self) -> dict[int, TimeSampling]:
        """Return the distribution of t at which guidance is taken, for clips of each exit step:
        that of the scores, below the step's t.

        Raises:
            ValueError: nothing lies there.
        """
        time = self.score_time
        return {
            step: evolve(time, t_max=min(time.t_max, t), limits="truncate")
            for step, (t, weight) in enumerate(
                zip(self.student_levels, self.exit_weights, strict=True)
            )
            if weight > 0
        }

    def problems(self, run: PlannedRun) -> Iterator[Problem]:
        """See ``MethodConfig.problems``."""
        yield from super().problems(run)
        if self.decoupled:
            try:
                self.augmentation_times()
            except ValueError as error:
                yield Problem("decoupled", f"true takes guidance below each exit step: {error}")

    @property
    def needs_latents(self) -> bool:
        """Whether clips of the data are noised, or shown to a discriminator."""
        return self.rollout == "data" or self.gan is not None

    def rollout_times(self, low: float, high: float) -> tuple[float, ...]:
        """See ``LatentMethodConfig.rollout_times``."""
        return self.levels_until(low, high) if self.rollout == "simulate" else ()
