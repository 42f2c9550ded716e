"""Tiny real Z-Image pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import torch

LATENT_CHANNELS = 4
TEXT_WIDTH = 16
MARKS = ("<|im_start|>", "<|im_end|>", "\n")
WORDS = ("<pad>", "<unk>", *MARKS, "user", "assistant", "a", "seven", "moving", "left")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""What Qwen3's own template makes of one message with thinking enabled."""


def build(folder: Path) -> Path:
    """Write a complete pipeline folder, random and seeded.

    A latent cell spans 8 x 8 pixels and a token four cells, as in the published models.

    Args:
        folder: where; made if it is not there.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import Qwen3Config, Qwen3Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        transformer = ZImageTransformer2DModel(
            in_channels=LATENT_CHANNELS, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
            n_kv_heads=2, cap_feat_dim=TEXT_WIDTH, axes_dims=[4, 6, 6], axes_lens=[128, 16, 16],
        )  # fmt: skip
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(token, std=0.3)  # zero as built, and then no padding is seen
        vae = AutoencoderKL(
            block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=LATENT_CHANNELS,
            norm_num_groups=2, scaling_factor=0.3611, shift_factor=0.1159,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        encoder = Qwen3Model(
            Qwen3Config(
                vocab_size=len(WORDS), hidden_size=TEXT_WIDTH, intermediate_size=32, head_dim=8,
                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                initializer_range=0.3,
            )
        )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    encoder.save_pretrained(folder / "text_encoder")
    _save_tokenizer(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "ZImagePipeline",
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        # Qwen2Tokenizer in the published ones; this is what transformers 5 writes.
        "tokenizer": ["transformers", "TokenizersBackend"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Sequence, Split
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    marks = Regex(r"<\|im_start\|>|<\|im_end\|>|\n")
    tokenizer.pre_tokenizer = Sequence([Split(" ", "removed"), Split(marks, "isolated")])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=2048,
        chat_template=CHAT,
    ).save_pretrained(folder)
