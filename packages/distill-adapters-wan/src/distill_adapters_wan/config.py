"""The family's own section of a run file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import field, frozen
from attrs.validators import ge, in_

from distill_adapters_wan.causal.config import CausalConfig
from distill_adapters_wan.published import PUBLISHED


@frozen(kw_only=True)
class WanPipelineConfig:
    """The clip that is trained and sampled, and how the Wan models are called.

    Attributes:
        num_frames: frames of a clip, 4k + 1: the VAE keeps the first and folds each further four.
        height: pixels; divisible by 16 (VAE stride 8 x patch 2).
        width: pixels; likewise.
        max_sequence_length: tokens that a text embedding is padded to. Wan attends its padding, so
            it must be the data set's and, for a published Wan, 512.
        boundary_ratio: of a model of two experts, the sigma from which on the one for high noise
            is called; left out, what the model's own index says (Wan 2.2: 0.875 for text, 0.9 for
            images).
        components: Diffusers folder (or a published hub id) that VAE, text encoder and tokenizer
            come from; default: the path of the first role.
        cfg_batched: guidance in one forward of 2B instead of two of B: faster, more memory. For
            training; sampling makes two, as WanPipeline does.
        text_encoder_precision: of the UMT5 weights while prompts are encoded (UMT5-XXL: 23 GB in
            fp32, 11 GB in bf16).
        causal: roles that make a clip chunk by chunk, and how; default: none.
    """

    num_frames: int = field()
    height: int = field()
    width: int = field()
    max_sequence_length: int = field(default=512, validator=ge(1))
    boundary_ratio: float | None = field(default=None)
    components: str | None = field(default=None, metadata={"path": tuple(PUBLISHED)})
    cfg_batched: bool = True
    text_encoder_precision: Literal["fp32", "bf16"] = field(
        default="fp32", validator=in_(("fp32", "bf16"))
    )
    causal: CausalConfig | None = None

    @property
    def text_settings(self) -> Mapping[str, object]:
        """What an embedding depends on beside encoder and tokenizer, by entry of a fingerprint."""
        return {
            "text_encoder.length": self.max_sequence_length,
            "text_encoder.precision": self.text_encoder_precision,
        }

    @num_frames.validator
    def _check_frames(self, attribute: object, value: int) -> None:
        if value < 1 or value % 4 != 1:
            below = max(1, (value - 1) // 4 * 4 + 1)
            raise ValueError(
                f"{value} must be 4k + 1, because the Wan VAE keeps the first frame and folds each "
                f"further four into one latent frame; {below} or {below + 4} would do"
            )

    @boundary_ratio.validator
    def _check_boundary(self, attribute: object, value: float | None) -> None:
        if value is not None and not 0 < value < 1:
            raise ValueError(
                f"{value} must lie between 0 and 1: it is the noise level (sigma) at which one "
                "expert takes over from the other, and at either end one of them would never be "
                "called. Leave it out for the model's own"
            )

    @height.validator
    @width.validator
    def _check_pixels(self, attribute: object, value: int) -> None:
        if value < 16 or value % 16:
            below = max(16, value // 16 * 16)
            raise ValueError(
                f"{value} must be divisible by 16, because the VAE shrinks it 8 times and the "
                f"transformer takes patches of 2; {below} or {below + 16} would do"
            )
