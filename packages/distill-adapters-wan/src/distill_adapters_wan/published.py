"""Architecture numbers of the published Wan models, so that a run can be planned offline.

The transformer numbers are those of diffusers' ``scripts/convert_wan_to_diffusers.py``; a key that
is not listed has ``WanTransformer3DModel``'s default.
"""

from __future__ import annotations

from collections.abc import Mapping

from distill_diffusers.descriptions import LatentInfo, PublishedModel

_COMMON: Mapping[str, object] = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}
_SMALL = {**_COMMON, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_LARGE = {**_COMMON, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_IMAGE_21 = {**_LARGE, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_PAIR_21 = {**_IMAGE_21, "pos_embed_seq_len": 514}
_IMAGE_22 = {**_LARGE, "in_channels": 36}
_DENSE_5B = {
    **_COMMON,
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "num_layers": 30,
    "in_channels": 48,
    "out_channels": 48,
}
_VAE_21 = LatentInfo(channels=16, stride_t=4, stride_hw=8)
_VAE_22 = LatentInfo(channels=48, stride_t=4, stride_hw=16)

PUBLISHED: Mapping[str, PublishedModel] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": PublishedModel(
        transformers={"transformer": _SMALL}, latents=_VAE_21
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": PublishedModel(
        transformers={"transformer": _LARGE}, latents=_VAE_21
    ),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": PublishedModel(
        transformers={"transformer": _IMAGE_21}, latents=_VAE_21
    ),
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": PublishedModel(
        transformers={"transformer": _IMAGE_21}, latents=_VAE_21
    ),
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": PublishedModel(
        transformers={"transformer": _PAIR_21}, latents=_VAE_21
    ),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": PublishedModel(
        transformers={"transformer": _LARGE, "transformer_2": _LARGE},
        latents=_VAE_21,
        call_options={"boundary_ratio": 0.875},
    ),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": PublishedModel(
        transformers={"transformer": _IMAGE_22, "transformer_2": _IMAGE_22},
        latents=_VAE_21,
        call_options={"boundary_ratio": 0.900},
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": PublishedModel(
        transformers={"transformer": _DENSE_5B},
        latents=_VAE_22,
        call_options={"expand_timesteps": True},
    ),
}
"""Hub id -> numbers."""
