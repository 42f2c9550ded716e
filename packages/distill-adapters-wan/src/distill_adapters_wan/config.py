"""The family's own section of a run file."""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import ge
from distill_diffusers.config import VideoConfig

from distill_adapters_wan.causal.config import CausalConfig
from distill_adapters_wan.published import PUBLISHED


@frozen(kw_only=True)
class WanPipelineConfig(VideoConfig):
    """The clip that is trained and sampled, and how the Wan models are called.

    Beside the keys of ``VideoConfig`` (4k + 1 frames; height and width divisible by 16: VAE stride
    8 x patch 2):

    Attributes:
        max_sequence_length: tokens that a text embedding is padded to. Wan attends its padding, so
            it must be the data set's and, for a published Wan, 512.
        boundary_ratio: of a model of two experts, the sigma from which on the one for high noise
            is called; left out, what the model's own index states (Wan 2.2: 0.875 for text, 0.9 for
            images).
        causal: roles that make a clip chunk by chunk, and how; default: none.
    """

    components: str | None = field(default=None, metadata={"path": tuple(PUBLISHED)})
    max_sequence_length: int = field(default=512, validator=ge(1))
    boundary_ratio: float | None = field(default=None)
    causal: CausalConfig | None = None

    @boundary_ratio.validator
    def _check_boundary(self, attribute: object, value: float | None) -> None:
        if value is not None and not 0 < value < 1:
            raise ValueError(
                f"{value} must lie between 0 and 1: it is the noise level (sigma) at which one "
                "expert takes over from the other, and at either end one of them would never be "
                "called. Leave it out for the model's own"
            )
