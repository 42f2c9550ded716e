"""Prompts to conditions, as ``ZImagePipeline.encode_prompt`` makes them of one prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from distill_diffusers.components.encoders import TextEncoders
from distill_protocols import ConditioningError
from torch import Tensor

from distill_adapters_z_image.kind import TEXT, TEXT_MASK

ENCODER = "transformers.models.qwen3.modeling_qwen3:Qwen3Model"
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""What Qwen3's own template makes of one message with thinking enabled."""


@torch.no_grad()
def encode_prompts(
    encoders: TextEncoders, prompts: Sequence[str], length: int, device: torch.device
) -> dict[str, Tensor]:
    """Encode to ``text`` [B, length, D], zeros beyond the prompt, and ``text_mask`` [B, length].

    One prompt is encoded at a time, so that a row depends on its prompt alone.

    Raises:
        ConditioningError: no prompts.
        WeightsError: as ``TextEncoders.loaded``.
    """
    if not prompts:
        raise ConditioningError("no prompts to encode; give one a sample (it may be empty)")
    rows, masks = [], []
    with encoders.loaded() as text:
        for prompt in prompts:
            tokens = text.tokenizer(
                PROMPT.format(prompt),
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            ).to(device)
            mask = tokens.attention_mask.bool()
            output = text.encoder(tokens.input_ids, mask, output_hidden_states=True)
            embedded = output.hidden_states[-2][mask].float()
            row = embedded.new_zeros(length, embedded.shape[1])
            row[: len(embedded)] = embedded
            rows.append(row)
            masks.append((torch.arange(length, device=device) < len(embedded)).float())
    return {TEXT: torch.stack(rows), TEXT_MASK: torch.stack(masks)}
