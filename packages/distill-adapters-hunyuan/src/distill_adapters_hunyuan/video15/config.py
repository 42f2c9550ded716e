"""The family's own section of a run file. No torch here: run files are checked without it."""

from __future__ import annotations

from attrs import field, frozen
from distill_diffusers.config import VideoConfig
from distill_protocols.validators import at_least

from distill_adapters_hunyuan.video15.kind import PUBLISHED


@frozen(kw_only=True)
class HunyuanVideo15Config(VideoConfig):
    """The clip that is trained and sampled, and how the HunyuanVideo 1.5 models are called.

    Beside the keys of ``VideoConfig`` (4k + 1 frames; height and width divisible by 16):

    Attributes:
        max_sequence_length: number of tokens that a prompt is padded or cut to for Qwen2.5-VL, its
            template not counted. Padding is attended by nothing, so a shorter one than the 1000 of
            ``HunyuanVideo15Pipeline`` changes nothing of a prompt that fits, and takes less room
            in a data set and less memory in a call.
        glyph_sequence_length: likewise for ByT5, which reads the parts of a prompt that stand in
            quotes, as bytes. ``HunyuanVideo15Pipeline`` uses 256.
    """

    pixel_unit = 16
    frame_unit = 4

    components: str | None = field(default=None, metadata={"path": tuple(PUBLISHED)})
    max_sequence_length: int = field(
        default=1000, validator=at_least(1, "a prompt has at least the token that ends it")
    )
    glyph_sequence_length: int = field(
        default=256, validator=at_least(1, "a text in quotes has at least one byte")
    )
