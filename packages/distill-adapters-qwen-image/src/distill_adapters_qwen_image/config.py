"""The family's own section of a run file. No torch here: run files are checked without it."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen
from attrs.validators import in_
from distill_diffusers.config import ImageConfig
from distill_protocols.validators import within

from distill_adapters_qwen_image.published import MAX_TEXT_TOKENS, PATCH, PUBLISHED, STRIDE_HW


@frozen(kw_only=True)
class QwenImageConfig(ImageConfig):
    """The picture that is trained and sampled, and how its text is encoded.

    Beside the keys of ``ImageConfig`` (height and width divisible by 16):

    Attributes:
        components: as in ``ImageConfig``, or a published hub id.
        max_sequence_length: number of tokens that a prompt is padded or cut to; it must equal the
            data set's. The padding is not attended to, so it costs time and changes no picture.
            ``QwenImagePipeline`` cuts at 512 unless another number is passed, and takes at most
            1024.
        text_encoder_precision: of the text encoder's weights while prompts are encoded (33 GB in
            fp32, 17 GB in bf16, which is how they are published).
    """

    pixel_unit = STRIDE_HW * PATCH

    components: str | None = field(default=None, metadata={"path": tuple(PUBLISHED)})
    max_sequence_length: int = field(
        default=512,
        validator=within(1, MAX_TEXT_TOKENS, "QwenImagePipeline takes no other lengths"),
    )
    text_encoder_precision: Literal["fp32", "bf16"] = field(
        default="fp32", validator=in_(("fp32", "bf16"))
    )
