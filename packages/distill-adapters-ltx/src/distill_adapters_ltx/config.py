"""The family's own section of a run file. No torch here: run files are checked without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import field, frozen
from attrs.validators import in_
from distill_protocols.validators import above, at_least, within

from distill_adapters_ltx.published import PUBLISHED, STRIDE_HW, STRIDE_T

_DECODE_TIME = (
    "it is the noise level, from 0 (clean) to 1 (noise), that the decoder removes while it "
    "decodes; Lightricks uses 0.05"
)


@frozen(kw_only=True)
class LTXPipelineConfig:
    """The clip that is trained and sampled, and how the LTX models are called.

    Attributes:
        num_frames: frames of a clip, 8k + 1: the VAE keeps the first and folds each further eight.
        height: pixels; divisible by 32, which is what the VAE makes one latent cell of.
        width: pixels; likewise.
        frame_rate: frames per second. LTX's positions are in seconds, so the model reads it: use
            the frame rate of the data set, also for sampling. 25 is the default of diffusers.
        max_sequence_length: number of tokens that a prompt is padded or cut to. It must equal the
            data set's, because ``LTXPipeline`` lets the text encoder attend to the padding: the
            embedding of a prompt depends on it. ``LTXPipeline`` uses 128, ``LTXConditionPipeline``
            256.
        components: Diffusers folder (or a published hub id) that VAE, text encoder and tokenizer
            come from; default: the path of the first role.
        text_encoder_precision: of the T5 weights while prompts are encoded (T5-XXL's encoder:
            19 GB in fp32, 10 GB in bf16).
        decode_timestep: noise level that a timestep-conditioned decoder is called with (VAEs from
            0.9.1 on; the VAE of 0.9.0 does not read it).
        decode_noise_scale: share s of noise in the latents that such a decoder gets,
            ``(1 - s) z + s noise``.
        cfg_batched: guidance in one call of batch 2B instead of two of B: faster, but it takes more
            memory. This is for training; sampling always makes one call, as ``LTXPipeline`` does.
        guidance_rescale: phi of Lin et al. 2024 ("Common Diffusion Noise Schedules and Sample Steps
            are Flawed", section 3.4), which scales a guided prediction to the standard deviation of
            the conditional one. 0 switches it off.
    """

    num_frames: int = field()
    height: int = field()
    width: int = field()
    frame_rate: float = field(
        default=25.0, validator=above(0, "it is the number of frames per second; 24 to 30 is usual")
    )
    max_sequence_length: int = field(
        default=128, validator=at_least(1, "a prompt has at least the token that ends it")
    )
    components: str | None = field(default=None, metadata={"path": tuple(PUBLISHED)})
    text_encoder_precision: Literal["fp32", "bf16"] = field(
        default="fp32", validator=in_(("fp32", "bf16"))
    )
    decode_timestep: float = field(default=0.05, validator=within(0, 1, _DECODE_TIME))
    decode_noise_scale: float = field(
        default=0.025,
        validator=within(
            0,
            1,
            "it is the share of noise in the latents that are decoded, and at 1 nothing of the "
            "clip is left; Lightricks uses 0.025",
        ),
    )
    cfg_batched: bool = True
    guidance_rescale: float = field(
        default=0.0,
        validator=within(
            0,
            1,
            "it mixes the guided prediction (0) with the rescaled one (1); 0.7 is customary "
            "against overexposure by strong guidance",
        ),
    )

    @property
    def text_settings(self) -> Mapping[str, object]:
        """What an embedding depends on beside encoder and tokenizer, by entry of a fingerprint."""
        return {
            "text_encoder.length": self.max_sequence_length,
            "text_encoder.precision": self.text_encoder_precision,
        }

    @num_frames.validator
    def _check_frames(self, attribute: object, value: int) -> None:
        if value < 1 or value % STRIDE_T != 1:
            below = max(1, (value - 1) // STRIDE_T * STRIDE_T + 1)
            raise ValueError(
                f"{value} must be 8k + 1, because the LTX VAE keeps the first frame and folds each "
                f"further eight into one latent frame; {below} or {below + STRIDE_T} would do"
            )

    @height.validator
    @width.validator
    def _check_pixels(self, attribute: object, value: int) -> None:
        if value < STRIDE_HW or value % STRIDE_HW:
            below = max(STRIDE_HW, value // STRIDE_HW * STRIDE_HW)
            raise ValueError(
                f"{value} must be divisible by 32, because the LTX VAE makes one latent cell of "
                f"32 x 32 pixels; {below} or {below + STRIDE_HW} would do"
            )
