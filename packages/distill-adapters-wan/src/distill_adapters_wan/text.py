"""UMT5 as Wan reads it: prompts to padded embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from distill_diffusers.components.encoders import TextEncoders
from distill_protocols import WeightsError
from torch import Tensor, nn

from distill_adapters_wan.config import WanPipelineConfig


def wan_encoders(source: str, config: WanPipelineConfig, *, device: torch.device) -> TextEncoders:
    """Describe UMT5 and its tokenizer in the folder or hub id ``source``."""
    return TextEncoders.single(
        source,
        "transformers.models.umt5.modeling_umt5:UMT5EncoderModel",
        length=config.max_sequence_length,
        precision=config.text_encoder_precision,
        device=device,
        check=check_tied_embedding,
    )


def encode_text(encoders: TextEncoders, prompts: Sequence[str], length: int) -> Tensor:
    """Encode to [B, length, D] fp32, exactly 0 beyond each prompt's own length.

    As ``WanPipeline.encode_prompt`` does, its clean-up of the prompt included.

    Raises:
        ConditioningError: no prompts.
    """
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    cleaned = [prompt_clean(prompt) for prompt in prompts]
    return encoders.embed(cleaned, length, attend_padding=False)[0]


def check_tied_embedding(encoder: nn.Module, folder: Path) -> None:
    """Refuse a UMT5 whose token embedding was not tied when it was loaded.

    Some transformers 5 builds left ``embed_tokens`` untied or zero (transformers PR 43880), and
    then every prompt is encoded alike.

    Raises:
        WeightsError: the two tables differ, or are zero.
    """
    umt5: Any = encoder
    tokens, shared = umt5.encoder.embed_tokens.weight, umt5.shared.weight
    if not torch.equal(tokens, shared) or not bool(shared.any()):
        raise WeightsError(
            f"{folder}: encoder.embed_tokens differs from shared after loading (or is all zero); "
            "they must be one table, or every prompt encodes alike. This is a problem of some "
            "transformers 5 builds (PR 43880): install another version"
        )
