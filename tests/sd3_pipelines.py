"""Tiny real Stable Diffusion 3 pipelines, one of each published kind."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

LATENT_CHANNELS = 4
CLIP_TOKENS = 77
CLIP_WIDTHS = (12, 16)
TEXT_WIDTH = 32
"""Of T5 and of the transformer; both CLIPs together have 28, and 4 zeros follow."""
WORDS = ("<pad>", "<s>", "<unk>", "</s>", "a", "seven", "moving", "left")


@frozen(kw_only=True)
class Version:
    """What differs between the published kinds.

    Attributes:
        transformer: arguments of SD3Transformer2DModel, beside those that all share.
        t5: whether the pipeline has the third text encoder.
    """

    transformer: Mapping[str, Any]
    t5: bool = True


VERSIONS = {
    "3-medium": Version(transformer={}),
    "3-medium-without-t5": Version(transformer={}, t5=False),
    "3.5-medium": Version(transformer={"qk_norm": "rms_norm", "dual_attention_layers": (0,)}),
    "3.5-large": Version(transformer={"qk_norm": "rms_norm"}),
}


def family() -> tuple[Any, Any]:
    """Return the plugin of the example package, which is not installed here, and its config."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "family-sd3" / "src"))
    try:
        from distill_family_sd3.config import SD3PipelineConfig
        from distill_family_sd3.plugin import PLUGIN
    finally:
        sys.path.pop(0)
    return PLUGIN, SD3PipelineConfig(height=64, width=64)


def build(folder: Path, version: str = "3-medium") -> Path:
    """Write a complete pipeline folder, random and seeded: 92,000 to 104,000 parameters.

    A latent cell spans 8 x 8 pixels and a token four cells, as in the published models. Images
    have at most 128 x 128 pixels.

    Args:
        folder: where; made if it is not there.
        version: a key of ``VERSIONS``.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    kind = VERSIONS[version]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        transformer = SD3Transformer2DModel(
            sample_size=8, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=2,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=32, pooled_projection_dim=sum(CLIP_WIDTHS),
            pos_embed_max_size=8, **kind.transformer,
        )  # fmt: skip
        # Four levels halve the picture three times. The published VAEs have no quant convolutions.
        vae = AutoencoderKL(
            block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=LATENT_CHANNELS,
            norm_num_groups=2, sample_size=64, scaling_factor=1.5305, shift_factor=0.0609,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        encoders = [make_clip(width) for width in CLIP_WIDTHS] + [_t5()] * kind.t5
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": "0.32.0",
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder_3": [None, None],
        "tokenizer_3": [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    # CLIP-L is padded with the token that ends a prompt, CLIP-G with another.
    for number, (encoder, pad) in enumerate(
        zip(encoders, ("</s>", "<pad>", "<pad>"), strict=False), start=1
    ):
        suffix = "" if number == 1 else f"_{number}"
        encoder.save_pretrained(folder / f"text_encoder{suffix}")
        save_tokenizer(folder / f"tokenizer{suffix}", pad=pad, begins=number < 3)
        index[f"text_encoder{suffix}"] = ["transformers", type(encoder).__name__]
        # CLIPTokenizer and T5TokenizerFast in the published ones; transformers 5 writes this.
        index[f"tokenizer{suffix}"] = ["transformers", "TokenizersBackend"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def make_clip(width: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    # The pooled embedding is that of the token ``eos_token_id``; 2 would mean the largest id.
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(WORDS), hidden_size=width, intermediate_size=2 * width,
            projection_dim=width, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=CLIP_TOKENS, bos_token_id=1, eos_token_id=3, pad_token_id=0,
            initializer_range=0.5,
        )
    )  # fmt: skip


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(WORDS), d_model=TEXT_WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
            dropout_rate=0.0, feed_forward_proj="gated-gelu", initializer_factor=1.0,
            pad_token_id=0, eos_token_id=3,
        )
    )  # fmt: skip


def save_tokenizer(folder: Path, *, pad: str, begins: bool) -> None:
    """Write a tokenizer of words that ends a prompt with ``</s>``, and begins it with ``<s>``."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>" if begins else "$A </s>", special_tokens=[("<s>", 1), ("</s>", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CLIP_TOKENS if begins else 512,
    ).save_pretrained(folder)
