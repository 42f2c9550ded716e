"""UMT5 as Wan reads it: prompts to padded embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from distill_diffusers.components.encoders import TextEncoders
from distill_diffusers.components.umt5 import clean_prompts, umt5_encoders
from torch import Tensor

from distill_adapters_wan.config import WanPipelineConfig


def wan_encoders(source: str, config: WanPipelineConfig, *, device: torch.device) -> TextEncoders:
    """Describe UMT5 and its tokenizer in the folder or hub id ``source``."""
    return umt5_encoders(
        source,
        length=config.max_sequence_length,
        precision=config.text_encoder_precision,
        device=device,
    )


def encode_text(encoders: TextEncoders, prompts: Sequence[str], length: int) -> Tensor:
    """Encode to [B, length, D] fp32, exactly 0 beyond each prompt's own length.

    As ``WanPipeline.encode_prompt`` does, its clean-up of the prompt included.

    Raises:
        ConditioningError: no prompts.
    """
    return encoders.embed(clean_prompts(prompts), length, attend_padding=False)[0]
