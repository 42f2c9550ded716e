"""Tiny real LTX-2 pipelines, of both published kinds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny_tokenizer
import torch
from distill_diffusers.calls.tokens import pack
from torch import Tensor

LATENT_CHANNELS = 8
TEXT_WIDTH = 16
MEAN = torch.linspace(-0.5, 0.5, LATENT_CHANNELS).view(1, -1, 1, 1, 1)
STD = torch.linspace(0.6, 1.7, LATENT_CHANNELS).view(1, -1, 1, 1, 1)
SOUND_BINS = 2

# LTX-2.3: gated attention, a text that is modulated by t, a projection for each part.
VERSIONS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "2.0": ({}, {}),
    "2.3": (
        {
            "gated_attn": True, "cross_attn_mod": True, "audio_gated_attn": True,
            "audio_cross_attn_mod": True, "use_prompt_embeddings": False, "perturbed_attn": True,
        },
        {
            "per_modality_projections": True, "video_hidden_dim": 32, "audio_hidden_dim": 16,
            "video_connector_attention_head_dim": 16, "video_gated_attn": True,
            "audio_gated_attn": True, "proj_bias": True,
        },
    ),
}  # fmt: skip


def normalised(latents: Tensor) -> Tensor:
    """Latents as ``LTX2Pipeline`` gives them, as the adapter has them."""
    return (latents - MEAN) / STD


def raw(latents: Tensor) -> Tensor:
    """And back: as it takes them."""
    return latents * STD + MEAN


def build(folder: Path, version: str = "2.3") -> Path:
    """Write a complete pipeline folder, random and seeded.

    A latent cell spans 8 frames of 32 x 32 pixels, as in the published models.

    Args:
        folder: where; made if it is not there.
        version: a key of ``VERSIONS``.
    """
    from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
    from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio
    from diffusers.models.transformers.transformer_ltx2 import LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    own_transformer, own_connectors = VERSIONS[version]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        transformer = LTX2VideoTransformer3DModel(
            **{
                "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS,
                "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32,
                "audio_in_channels": 8 * SOUND_BINS, "audio_out_channels": 8 * SOUND_BINS,
                "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
                "audio_cross_attention_dim": 16, "num_layers": 2, "caption_channels": TEXT_WIDTH,
                "rope_type": "split", **own_transformer,
            }
        )  # fmt: skip
        connectors = LTX2TextConnectors(
            **{
                "caption_channels": TEXT_WIDTH, "text_proj_in_factor": 2,
                "video_connector_num_attention_heads": 2, "video_connector_attention_head_dim": 8,
                "video_connector_num_layers": 1, "video_connector_num_learnable_registers": 4,
                "audio_connector_num_attention_heads": 2, "audio_connector_attention_head_dim": 8,
                "audio_connector_num_layers": 1, "audio_connector_num_learnable_registers": 4,
                "connector_rope_base_seq_len": 32, "rope_type": "split", **own_connectors,
            }
        )  # fmt: skip
        vae = AutoencoderKLLTX2Video(
            latent_channels=LATENT_CHANNELS, block_out_channels=(8, 8, 16, 16),
            decoder_block_out_channels=(8, 16, 32), layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        )  # fmt: skip
        vae.latents_mean.copy_(MEAN.flatten())
        vae.latents_std.copy_(STD.flatten())
        audio_vae = AutoencoderKLLTX2Audio(
            base_channels=8 * SOUND_BINS, ch_mult=(1, 1, 1), num_res_blocks=1,
            mel_bins=4 * SOUND_BINS, latent_channels=8,
        )  # fmt: skip
        audio_vae.latents_mean.copy_(torch.linspace(-0.3, 0.4, 8 * SOUND_BINS))
        audio_vae.latents_std.copy_(torch.linspace(0.5, 1.5, 8 * SOUND_BINS))
        vocoder = LTX2Vocoder(
            in_channels=2 * 4 * SOUND_BINS, hidden_channels=16, upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3]],
        )  # fmt: skip
        encoder = Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config={
                    "vocab_size": len(tiny_tokenizer.WORDS), "hidden_size": TEXT_WIDTH,
                    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1,
                    "bos_token_id": 1, "sliding_window": 8, "max_position_embeddings": 64,
                },
                vision_config={
                    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                    "num_attention_heads": 1, "image_size": 8, "patch_size": 4,
                },
                mm_tokens_per_image=4, boi_token_index=2, eoi_token_index=2, image_token_index=2,
            )
        )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    connectors.save_pretrained(folder / "connectors")
    vae.save_pretrained(folder / "vae")
    audio_vae.save_pretrained(folder / "audio_vae")
    vocoder.save_pretrained(folder / "vocoder")
    encoder.save_pretrained(folder / "text_encoder")
    tiny_tokenizer.save(folder / "tokenizer", max_length=64)
    FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
        max_image_seq_len=4096, shift_terminal=0.1,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    index = {
        "_class_name": "LTX2Pipeline",
        "_diffusers_version": "0.37.0",
        "audio_vae": ["diffusers", "AutoencoderKLLTX2Audio"],
        "connectors": ["ltx2", "LTX2TextConnectors"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Gemma3ForConditionalGeneration"],
        "tokenizer": ["transformers", "TokenizersBackend"],
        "transformer": ["diffusers", "LTX2VideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLLTX2Video"],
        "vocoder": ["ltx2", "LTX2Vocoder"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def isolate(pipeline: Any, _config: Any) -> None:
    """Let the pipeline call its transformer as a run without sound does."""

    def hook(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "isolate_modalities": True}

    pipeline.transformer.register_forward_pre_hook(hook, with_kwargs=True)


__all__ = ["build", "isolate", "normalised", "pack", "raw"]
