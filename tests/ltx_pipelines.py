"""Tiny real LTX-Video pipelines, one of each published kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny_tokenizer
import torch
from attrs import frozen

LATENT_CHANNELS = 8
TEXT_WIDTH = 16

# The scheduler of 0.9.0 and 0.9.1 (diffusers, scripts/convert_ltx_to_diffusers.py).
DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "max_image_seq_len": 4096,
    "shift_terminal": 0.1,
}
# That of 0.9.5 and 0.9.7.
STATIC = {"use_dynamic_shifting": False}

# Three scaled blocks are the fewest for 8 frames a latent frame: a block halves time at most once,
# and the class ignores patch_size_t. Three halvings of space leave patches of 4 pixels for the 32
# that LTXPipeline demands of heights and widths.
_ENCODER_090 = {"block_out_channels": (4, 4, 4), "spatio_temporal_scaling": (True,) * 3}
_DECODER_090 = {
    "decoder_block_out_channels": (4, 4, 4),
    "decoder_spatio_temporal_scaling": (True,) * 3,
}
_ENCODER_095 = {
    "block_out_channels": (4, 4, 8, 8, 8),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "spatio_temporal_scaling": (True,) * 4,
    "layers_per_block": (1,) * 5,
    # Four scaled blocks that do not all scale both: the class would compute 64 and 16.
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
_DECODER_091 = {
    # Residual upsampling needs eight channels, and factors of 2 (which all three published ones
    # are) would need 32 in the first block.
    "decoder_block_out_channels": (8, 8, 8),
    "upsample_factor": (2, 1, 1),
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "upsample_residual": (True,) * 3,
    "timestep_conditioning": True,
}


@frozen(kw_only=True)
class Version:
    """What differs between the published kinds.

    Attributes:
        scheduler: arguments of FlowMatchEulerDiscreteScheduler.
        vae: arguments of AutoencoderKLLTXVideo, beside those that all share.
        pipeline: class of the pipeline in ``model_index.json``.
    """

    scheduler: Mapping[str, Any]
    vae: Mapping[str, Any]
    pipeline: str = "LTXPipeline"


VERSIONS = {
    "0.9.0": Version(scheduler=DYNAMIC, vae={**_ENCODER_090, **_DECODER_090}),
    "0.9.1": Version(
        scheduler=DYNAMIC,
        # Noise within the decoder is drawn from torch's global generator.
        vae={**_ENCODER_090, **_DECODER_091, "decoder_inject_noise": (True, True, True, False)},
    ),
    "0.9.5": Version(scheduler=STATIC, vae={**_ENCODER_095, **_DECODER_091}),
    "0.9.7": Version(
        scheduler=STATIC, vae={**_ENCODER_095, **_DECODER_091}, pipeline="LTXConditionPipeline"
    ),
}


def build(folder: Path, version: str = "0.9.0") -> Path:
    """Write a complete pipeline folder, random and seeded: 83,000 to 183,000 parameters.

    A latent cell spans 8 frames of 32 x 32 pixels, as in the published models.

    Args:
        folder: where; made if it is not there.
        version: a key of ``VERSIONS``.
    """
    from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo
    from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import T5Config, T5EncoderModel

    kind = VERSIONS[version]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        transformer = LTXVideoTransformer3DModel(
            in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_attention_heads=2,
            # 2 x 16 leaves a rest of 2 by 6, as 2,048 does: RoPE pads it in front.
            attention_head_dim=16, cross_attention_dim=32, num_layers=2,
            caption_channels=TEXT_WIDTH,
        )  # fmt: skip
        vae = AutoencoderKLLTXVideo(
            **{
                "latent_channels": LATENT_CHANNELS, "layers_per_block": (1,) * 4,
                "decoder_layers_per_block": (1,) * 4,
                "decoder_inject_noise": (False,) * 4,
                # 1 in all published models; another shows who leaves it out, and a power of 2 does
                # not round.
                "scaling_factor": 0.5, **kind.vae,
            }
        )  # fmt: skip
        for name, parameter in vae.named_parameters():
            if "per_channel_scale" in name:  # zero as built, and then no noise is seen
                torch.nn.init.normal_(parameter, std=0.3)
        vae.latents_mean.copy_(0.5 * torch.randn(LATENT_CHANNELS))
        vae.latents_std.copy_(torch.linspace(0.6, 1.7, LATENT_CHANNELS))
        encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tiny_tokenizer.WORDS), d_model=TEXT_WIDTH, d_kv=8, d_ff=16,
                num_layers=1, num_heads=2, dropout_rate=0.0, feed_forward_proj="gated-gelu",
                initializer_factor=1.0, pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    encoder.save_pretrained(folder / "text_encoder")
    tiny_tokenizer.save(folder / "tokenizer", max_length=128)
    FlowMatchEulerDiscreteScheduler(**kind.scheduler).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": kind.pipeline,
        "_diffusers_version": "0.32.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        # T5Tokenizer in the published ones; this is what transformers 5 writes.
        "tokenizer": ["transformers", "TokenizersBackend"],
        "transformer": ["diffusers", "LTXVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLLTXVideo"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
