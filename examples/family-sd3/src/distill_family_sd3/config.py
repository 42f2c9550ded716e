"""The family's own section of a run file. No torch here: run files are checked without it."""

from __future__ import annotations

from attrs import field, frozen
from distill_protocols.validators import within

from distill_family_sd3.published import PUBLISHED


@frozen(kw_only=True)
class SD3PipelineConfig:
    """The picture that is trained and sampled.

    Attributes:
        height: pixels; divisible by 16 (VAE stride 8 x patch 2).
        width: pixels; likewise.
        max_sequence_length: tokens that a prompt is padded or cut to for T5; those for CLIP are
            always 77. SD 3 attends the padding, so this must be the data set's.
            ``StableDiffusion3Pipeline`` uses 256 and takes 512 at most.
        components: Diffusers folder (or a published hub id) that VAE, text encoders and tokenizers
            come from; default: the path of the first role.
    """

    height: int = field()
    width: int = field()
    max_sequence_length: int = field(
        default=256, validator=within(1, 512, "StableDiffusion3Pipeline takes no other lengths")
    )
    components: str | None = field(default=None, metadata={"path": tuple(PUBLISHED)})

    @height.validator
    @width.validator
    def _check_pixels(self, attribute: object, value: int) -> None:
        if value < 16 or value % 16:
            below = max(16, value // 16 * 16)
            raise ValueError(
                f"{value} must be divisible by 16, because the VAE shrinks it 8 times and the "
                f"transformer takes patches of 2; {below} or {below + 16} would do"
            )
