"""The model class and the numbers of the published models. No torch here.

Sources: diffusers' ``convert_sd3_to_diffusers.py`` (what all share, heads = layers, positions) and
``single_file_utils.py`` (layers); ``transformer/config.json`` of SD 3.5 medium (dual attention).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_diffusers.descriptions import LatentInfo, PublishedModel
from distill_diffusers.kinds import ModelKind

SD3 = ModelKind(
    transformer="diffusers.models.transformers.transformer_sd3:SD3Transformer2DModel",
    vae="diffusers.models.autoencoders.autoencoder_kl:AutoencoderKL",
    pipelines=(
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3:"
        "StableDiffusion3Pipeline",
    ),
    stored_like="pos_embed.proj.weight",
    # Those of diffusers' train_dreambooth_lora_sd3.py.
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.to_add_out"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ),
)
_CLIP = "transformers.models.clip.modeling_clip:CLIPTextModelWithProjection"
TEXT_ENCODERS = (_CLIP, _CLIP, "transformers.models.t5.modeling_t5:T5EncoderModel")
"""Classes of the text encoders in their order. A pipeline may come without the last."""
CLIP_TOKENS = 77
"""Tokens of a prompt that CLIP reads, padding included; of every published model."""


def _published(layers: int, positions: int, **others: Any) -> PublishedModel:
    transformer = {
        "num_layers": layers,
        "num_attention_heads": layers,
        "caption_projection_dim": 64 * layers,
        "pos_embed_max_size": positions,
        **others,
    }
    return PublishedModel(
        transformers={"transformer": transformer}, latents=LatentInfo(channels=16)
    )


PUBLISHED: Mapping[str, PublishedModel] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": _published(24, 192),
    "stabilityai/stable-diffusion-3.5-medium": _published(
        24, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
    ),
    "stabilityai/stable-diffusion-3.5-large": _published(38, 192, qk_norm="rms_norm"),
    "stabilityai/stable-diffusion-3.5-large-turbo": _published(38, 192, qk_norm="rms_norm"),
}
"""Hub id -> numbers."""
