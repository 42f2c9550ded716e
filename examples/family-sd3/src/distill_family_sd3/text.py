"""Prompts to conditions, bit for bit as ``StableDiffusion3Pipeline.encode_prompt`` does.

Letters: B batch, L tokens, D width of the transformer's text, P width of the pooled embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distill_family_sd3.shapes import POOLED, TEXT


@torch.no_grad()
def encode_prompts(
    prompts: Sequence[str],
    tokenizers: Sequence[Any],
    encoders: Sequence[Any],
    *,
    length: int,
    width: int,
) -> dict[str, Tensor]:
    """Encode prompts to text [B, L, D] and pooled [B, P], both fp32.

    The two CLIPs' last but one hidden states stand beside each other, with zeros up to D; T5's
    tokens follow them. A model without T5 has zeros there. Nothing is masked: T5 and the
    transformer attend the padding.

    Args:
        tokenizers: CLIP-L's, CLIP-G's and T5's.
        encoders: CLIP-L, CLIP-G and T5; of both sequences the third may be None or left out.
        length: tokens for T5.
        width: D, the transformer's ``joint_attention_dim``.
    """
    clip_length = tokenizers[0].model_max_length
    outputs = [
        encoder(_token_ids(tokenizer, prompts, clip_length, encoder), output_hidden_states=True)
        for tokenizer, encoder in zip(tokenizers[:2], encoders[:2], strict=True)
    ]
    clip = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1).float()
    clip = functional.pad(clip, (0, width - clip.shape[-1]))
    pooled = torch.cat([output.text_embeds for output in outputs], dim=-1).float()
    t5 = clip.new_zeros(len(prompts), length, width)
    if len(encoders) > 2 and encoders[2] is not None:
        t5 = encoders[2](_token_ids(tokenizers[2], prompts, length, encoders[2]))[0].float()
    return {TEXT: torch.cat([clip, t5], dim=1), POOLED: pooled}


def _token_ids(tokenizer: Any, prompts: Sequence[str], length: int, encoder: Any) -> Tensor:
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )
    return tokens.input_ids.to(encoder.device)
