"""Architecture numbers of the published models, so that a run can be planned offline.

- What all share, heads = layers, and the size of the position table: diffusers,
  ``scripts/convert_sd3_to_diffusers.py``. Layers: ``loaders/single_file_utils.py``, which tells the
  models apart by them. Dual attention: ``transformer/config.json`` of SD 3.5 medium.
- The VAE: the same script; the channels of its blocks are those of SDXL's VAE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLIP_TOKENS = 77
"""Tokens of a prompt that CLIP reads, padding included."""


def _transformer(layers: int, positions: int, **others: Any) -> Mapping[str, Any]:
    return {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "num_attention_heads": layers,
        "attention_head_dim": 64,
        "caption_projection_dim": 64 * layers,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": positions,
        **others,
    }


PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _transformer(24, 192),
    "stabilityai/stable-diffusion-3.5-medium": _transformer(
        24, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
    ),
    "stabilityai/stable-diffusion-3.5-large": _transformer(38, 192, qk_norm="rms_norm"),
    "stabilityai/stable-diffusion-3.5-large-turbo": _transformer(38, 192, qk_norm="rms_norm"),
}
"""Hub id -> keyword arguments of ``SD3Transformer2DModel``."""

VAE: Mapping[str, Any] = {"latent_channels": 16, "block_out_channels": (128, 256, 512, 512)}
"""Of all published models: those numbers of ``AutoencoderKL`` that latents depend on."""
