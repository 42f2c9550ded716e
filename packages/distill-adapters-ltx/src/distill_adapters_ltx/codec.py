"""The VAE of LTX, whose decoder may remove the last noise."""

from __future__ import annotations

from typing import Any

import torch
from distill_diffusers.components.codec import VideoCodec
from distill_protocols import derive_seed
from torch import Tensor

from distill_adapters_ltx.config import LTXPipelineConfig
from distill_adapters_ltx.kind import LTX
from distill_adapters_ltx.published import STRIDE_HW, STRIDE_T

DECODE_SEED = derive_seed(0, "ltx.decode")
"""Of the noise that a timestep-conditioned decoder gets, the same for each clip."""


class LtxCodec(VideoCodec):
    """``VideoCodec`` of ``AutoencoderKLLTXVideo``.

        A timestep-conditioned decoder (0.9.1 and later) gets latents with a little noise and its
        level, and may draw more noise within. All of it is a function of the clip's shape alone, so
        that a clip depends neither on its neighbours nor on what drew before.

        Args:
            source: Diffusers folder or hub id.
    config: how much noise.
            device: where it runs.
    """

    def __init__(self, source: str, config: LTXPipelineConfig, *, device: torch.device) -> None:
        super().__init__(LTX.vae, source, strides=(STRIDE_T, STRIDE_HW), device=device)
        self._time = config.decode_timestep
        self._scale = config.decode_noise_scale

    def decode_part(self, vae: Any, latents: Tensor) -> Tensor:
        """See ``VideoCodec.decode_part``; one clip a call where the decoder draws noise."""
        if not vae.config.timestep_conditioning:
            return super().decode_part(vae, latents)
        return torch.cat([self._decode_with_noise(vae, clip) for clip in latents.split(1)])

    def _decode_with_noise(self, vae: Any, clip: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(DECODE_SEED)  # the CPU's, on every device
        noise = torch.randn(clip.shape, generator=generator).to(clip)
        scale, time = (clip.new_tensor([value]) for value in (self._scale, self._time))
        devices = [clip.device] if clip.is_cuda else []
        # Decoders with inject_noise (0.9.1) draw from the global generator within their blocks.
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(DECODE_SEED)
            return vae.decode((1 - scale) * clip + scale * noise, time).sample
