"""Prompts to conditions, bit for bit as ``StableDiffusion3Pipeline.encode_prompt`` does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from distill_diffusers.components.encoders import TextEncoders
from torch import Tensor
from torch.nn import functional


def encode_prompts(
    encoders: TextEncoders, prompts: Sequence[str], length: int, width: int
) -> dict[str, Tensor]:
    """Encode to text [B, L, D] and pooled [B, P], both fp32.

    The two CLIPs' last but one hidden states stand beside each other, with zeros up to D; T5's
    tokens follow them, or zeros. Nothing is masked: T5 and the transformer attend the padding.

    Args:
        length: L, of CLIP and T5 together.
        width: D, the transformer's ``joint_attention_dim``.
    """
    clips = [encoders.outputs(name, prompts) for name in encoders.names[:2]]
    clip = torch.cat([output.hidden_states[-2] for output in clips], dim=-1).float()
    clip = functional.pad(clip, (0, width - clip.shape[-1]))
    pooled = torch.cat([output.text_embeds for output in clips], dim=-1).float()
    rest = length - clip.shape[1]
    t5 = clip.new_zeros(len(prompts), rest, width)
    for name in encoders.names[2:]:
        t5 = encoders.outputs(name, prompts, length=rest)[0].float()
    return {"text": torch.cat([clip, t5], dim=1), "pooled": pooled}
