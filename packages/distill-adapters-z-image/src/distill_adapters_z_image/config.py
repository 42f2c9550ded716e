"""The family's own section of a run file. No torch here: run files are checked without it."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen
from attrs.validators import in_
from distill_diffusers.config import ImageConfig
from distill_protocols.validators import at_least, within

from distill_adapters_z_image.published import PATCH, PUBLISHED, STRIDE_HW


@frozen(kw_only=True)
class ZImageConfig(ImageConfig):
    """The picture that is trained and sampled, and how it is guided.

    Beside the keys of ``ImageConfig`` (height and width divisible by 16):

    Attributes:
        components: as in ``ImageConfig``, or a published hub id.
        max_sequence_length: number of tokens that a prompt is padded or cut to; it must equal the
            data set's. The transformer never reads the padding. ``ZImagePipeline`` has 512.
        text_encoder_precision: of the text encoder's weights while prompts are encoded (16 GB in
            fp32, 8 GB in bf16, which is how they are published).
        cfg_normalization: most that guidance may make of the norm of a prediction, as a multiple
            of the conditional one's; 0 leaves it.
        cfg_truncation: 1 - t / 1000 after which there is no guidance; 1: always.
    """

    pixel_unit = STRIDE_HW * PATCH

    components: str | None = field(default=None, metadata={"path": tuple(PUBLISHED)})
    max_sequence_length: int = field(
        default=512, validator=at_least(1, "a prompt has at least the marks of its turn")
    )
    text_encoder_precision: Literal["fp32", "bf16"] = field(
        default="fp32", validator=in_(("fp32", "bf16"))
    )
    cfg_normalization: float = field(
        default=0.0, validator=at_least(0, "it multiplies a norm; 1 keeps the conditional one's")
    )
    cfg_truncation: float = field(
        default=1.0,
        validator=within(0, 1, "it is a part of the way from noise to the picture; 1 is all of it"),
    )
