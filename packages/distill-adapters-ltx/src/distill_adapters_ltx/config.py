"""The family's own section of a run file. No torch here: run files are checked without it."""

from __future__ import annotations

from attrs import field, frozen
from distill_diffusers.config import VideoConfig
from distill_protocols.validators import above, at_least, within

from distill_adapters_ltx.published import PUBLISHED, STRIDE_HW, STRIDE_T


@frozen(kw_only=True)
class LTXPipelineConfig(VideoConfig):
    """The clip that is trained and sampled, and how the LTX models are called.

    Beside the keys of ``VideoConfig`` (8k + 1 frames; height and width divisible by 32):

    Attributes:
        frame_rate: frames per second. LTX's positions are in seconds, so the model reads it: use
            the frame rate of the data set, also for sampling. 25 is the default of diffusers.
        max_sequence_length: number of tokens that a prompt is padded or cut to. It must equal the
            data set's, because ``LTXPipeline`` lets the text encoder attend to the padding: the
            embedding of a prompt depends on it. ``LTXPipeline`` uses 128, ``LTXConditionPipeline``
            256.
        decode_timestep: noise level that a timestep-conditioned decoder is called with (VAEs from
            0.9.1 on; the VAE of 0.9.0 does not read it).
        decode_noise_scale: share s of noise in the latents that such a decoder gets,
            ``(1 - s) z + s noise``.
        guidance_rescale: phi of Lin et al. 2024 ("Common Diffusion Noise Schedules and Sample Steps
            are Flawed", section 3.4), which scales a guided prediction to the standard deviation of
            the conditional one. 0 switches it off.
    """

    pixel_unit = STRIDE_HW
    frame_unit = STRIDE_T

    components: str | None = field(default=None, metadata={"path": tuple(PUBLISHED)})
    frame_rate: float = field(
        default=25.0, validator=above(0, "it is the number of frames per second; 24 to 30 is usual")
    )
    max_sequence_length: int = field(
        default=128, validator=at_least(1, "a prompt has at least the token that ends it")
    )
    decode_timestep: float = field(
        default=0.05,
        validator=within(
            0,
            1,
            "it is the noise level, from 0 (clean) to 1 (noise), that the decoder removes while it "
            "decodes; Lightricks uses 0.05",
        ),
    )
    decode_noise_scale: float = field(
        default=0.025,
        validator=within(
            0,
            1,
            "it is the share of noise in the latents that are decoded, and at 1 nothing of the "
            "clip is left; Lightricks uses 0.025",
        ),
    )
    guidance_rescale: float = field(
        default=0.0,
        validator=within(
            0,
            1,
            "it mixes the guided prediction (0) with the rescaled one (1); 0.7 is customary "
            "against overexposure by strong guidance",
        ),
    )
