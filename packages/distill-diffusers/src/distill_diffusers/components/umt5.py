"""UMT5 as Wan and LongCat-Video read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from distill_protocols import Precision, WeightsError
from torch import nn

from distill_diffusers.components.encoders import TextEncoders


def umt5_encoders(
    source: str, *, length: int, precision: Precision, device: torch.device
) -> TextEncoders:
    """Describe UMT5 and its tokenizer in the folder or hub id ``source``.

    Args:
        length: tokens that a prompt is padded or cut to.
        precision: of its weights while it encodes.
        device: where it runs.
    """
    return TextEncoders.single(
        source,
        "transformers.models.umt5.modeling_umt5:UMT5EncoderModel",
        length=length,
        precision=precision,
        device=device,
        check=check_tied_embedding,
    )


def clean_prompts(prompts: Sequence[str]) -> list[str]:
    """Clean prompts up as ``WanPipeline`` and LongCat-Video's pipeline do."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return [prompt_clean(prompt) for prompt in prompts]


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
