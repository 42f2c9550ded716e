"""Tiny real Qwen-Image pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import torch

LATENT_CHANNELS = 4
TEXT_WIDTH = 16
# The words of QwenImagePipeline's template: with its marks and line ends they are 34 tokens before
# the prompt, as of Qwen2Tokenizer.
_TEMPLATE = (
    "system Describe the image by detailing color shape size texture quantity text spatial "
    "relationships of objects and background user assistant"
)
MARKS = ("<|im_start|>", "<|im_end|>", "\n", ",", ":")
WORDS = ("<pad>", "<unk>", *MARKS, *_TEMPLATE.split(), "a", "seven", "moving", "left")
# The scheduler of the published models (mflux, models/common/schedulers, and DiffSynth-Studio,
# diffsynth/diffusion/flow_match.py, state these numbers).
SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}


def build(folder: Path) -> Path:
    """Write a complete pipeline folder, random and seeded.

    A latent cell spans 8 x 8 pixels and a token four cells, as in the published models.

    Args:
        folder: where; made if it is not there.
    """
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        transformer = QwenImageTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=2,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        vae = AutoencoderKLQwenImage(
            base_dim=4, z_dim=LATENT_CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            latents_mean=[0.3, -0.2, 0.1, 0.0], latents_std=[0.7, 1.3, 1.9, 0.9],
        )  # fmt: skip
        encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": len(WORDS), "hidden_size": TEXT_WIDTH, "intermediate_size": 32,
                    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
                    "initializer_range": 0.3,
                    "rope_parameters": {
                        "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6,
                    },
                },
                vision_config={
                    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                    "out_hidden_size": TEXT_WIDTH, "fullatt_block_indexes": [0],
                },
                # The ids of special tokens must be those of words.
                image_token_id=1, video_token_id=1, vision_start_token_id=1, vision_end_token_id=1,
            )
        )  # fmt: skip
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    encoder.save_pretrained(folder / "text_encoder")
    _save_tokenizer(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "QwenImagePipeline",
        "_diffusers_version": "0.34.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        # Qwen2Tokenizer in the published ones; this is what transformers 5 writes.
        "tokenizer": ["transformers", "TokenizersBackend"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Sequence, Split
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    marks = Regex(r"<\|im_start\|>|<\|im_end\|>|[\n,:]")
    tokenizer.pre_tokenizer = Sequence([Split(" ", "removed"), Split(marks, "isolated")])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=2048,
    ).save_pretrained(folder)
