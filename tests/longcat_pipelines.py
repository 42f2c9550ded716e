"""A tiny LongCat-Video in the layout of the published folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import tiny_tokenizer
import torch
from torch import nn

LATENT_CHANNELS = 4
TEXT_WIDTH = 16
DIT: dict[str, Any] = {
    "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS,
    # A head of 24: 8 channels for each of time, height and width.
    "hidden_size": 48, "depth": 2, "num_heads": 2, "caption_channels": TEXT_WIDTH,
    "adaln_tembed_dim": 12, "frequency_embedding_size": 16,
    # As published: what the original chooses its kernels by.
    "enable_flashattn2": True, "bsa_params": {"sparsity": 0.9375},
}  # fmt: skip


def build(folder: Path, *, zero_pad: bool = True) -> Path:
    """Write a complete folder, random and seeded; it has no ``model_index.json``.

    Args:
        folder: where; made if it is not there.
        zero_pad: ``text_tokens_zero_pad`` of the transformer.
    """
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from distill_adapters_longcat import LongCatVideoTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        dit = LongCatVideoTransformer3DModel(**DIT, text_tokens_zero_pad=zero_pad)
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=LATENT_CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.1, 2.0],
        )  # fmt: skip
        encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tiny_tokenizer.WORDS), d_model=TEXT_WIDTH, d_kv=8, d_ff=16,
                num_layers=1, num_heads=2, dropout_rate=0.0, initializer_factor=1.0,
                pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
    draw_weights(dit)
    dit.save_pretrained(folder / "dit")
    vae.save_pretrained(folder / "vae")
    encoder.save_pretrained(folder / "text_encoder")
    tiny_tokenizer.save(folder / "tokenizer", max_length=512)
    FlowMatchEulerDiscreteScheduler(shift=12.0).save_pretrained(folder / "scheduler")
    return folder


@torch.no_grad()
def draw_weights(module: nn.Module) -> None:
    """Fill a module with numbers that depend on the names of its parameters alone, so that another
    code's module of the same names gets the same."""
    for seed, (name, parameter) in enumerate(sorted(module.named_parameters())):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        if parameter.dim() > 1:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        else:
            parameter.copy_(0.2 * noise + name.endswith("norm.weight"))
