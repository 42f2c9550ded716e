"""The family's own section of a run file. No torch here: run files are checked without it."""

from __future__ import annotations

from attrs import field, frozen
from distill_diffusers.config import VideoConfig
from distill_protocols.validators import at_least

from distill_adapters_longcat.published import PUBLISHED


@frozen(kw_only=True)
class LongCatPipelineConfig(VideoConfig):
    """The clip that is trained and sampled, and how LongCat-Video is called.

    Beside the keys of ``VideoConfig`` (4k + 1 frames; height and width divisible by 16: VAE stride
    8 x patch 2):

    Attributes:
        max_sequence_length: number of tokens that a prompt is padded or cut to. It must equal the
            data set's; 512 is the original's.
    """

    components: str | None = field(default=None, metadata={"path": tuple(PUBLISHED)})
    max_sequence_length: int = field(
        default=512, validator=at_least(1, "a prompt has at least the token that ends it")
    )
