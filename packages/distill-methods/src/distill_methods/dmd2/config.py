"""Options of DMD2. No torch here: run files are checked without it."""

from __future__ import annotations

from typing import get_args

from attrs import field, frozen
from attrs.validators import in_

from distill_methods.distribution_matching.whole_clips import WholeClipConfig
from distill_methods.latent_config import RolloutSource


@frozen(kw_only=True)
class DMD2Config(WholeClipConfig):
    """DMD2 (Yin et al. 2024, "Improved Distribution Matching Distillation").

    Attributes:
        rollout: simulate: the student's input comes from its own sampling from noise (DMD2's
            backward simulation), so training sees what sampling sees, and needs no data but
            captions. data: it is a noised clip of the data set (FastGen, CausVid).
    """

    rollout: RolloutSource = field(default="simulate", validator=in_(get_args(RolloutSource)))

    @property
    def needs_latents(self) -> bool:
        """Whether clips of the data are noised, or shown to a discriminator."""
        return self.rollout == "data" or self.gan is not None

    def rollout_times(self, low: float, high: float) -> tuple[float, ...]:
        """See ``LatentMethodConfig.rollout_times``."""
        return self.levels_until(low, high) if self.rollout == "simulate" else ()
