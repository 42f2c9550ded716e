"""The family's own section of a run file. No torch here: run files are checked without it."""

from __future__ import annotations

from attrs import field, frozen
from distill_diffusers.config import VideoConfig
from distill_protocols.validators import above, at_least

from distill_adapters_hunyuan.video.kind import PUBLISHED


@frozen(kw_only=True)
class HunyuanVideoConfig(VideoConfig):
    """The clip that is trained and sampled, and how the HunyuanVideo models are called.

    Beside the keys of ``VideoConfig`` (4k + 1 frames; height and width divisible by 16;
    ``cfg_batched`` has no effect, as guidance is never two calls):

    Attributes:
        max_sequence_length: number of tokens that a prompt is padded or cut to for Llama, its
            template not counted. Padding is attended by neither Llama nor the transformer.
            ``HunyuanVideoPipeline`` uses 256.
        embedded_guidance: w that the transformer reads in calls that ask for no guidance (w = 1):
            those of a student, of a critic, and of finetuning. At 1 a student learns to do without
            guidance; at the teacher's w, 6, it starts where the teacher is good, and keeps the
            input. Its export is then called with this ``guidance_scale``.
    """

    pixel_unit = 16
    frame_unit = 4

    components: str | None = field(default=None, metadata={"path": tuple(PUBLISHED)})
    max_sequence_length: int = field(
        default=256, validator=at_least(1, "a prompt has at least the token that ends it")
    )
    embedded_guidance: float = field(
        default=1.0, validator=above(0, "the models were distilled at guidance of 1 and more")
    )
