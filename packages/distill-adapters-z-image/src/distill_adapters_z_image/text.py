"""Prompts to conditions, as ``ZImagePipeline.encode_prompt`` makes them of one prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from distill_diffusers.components.encoders import LoadedEncoder, TextEncoders
from distill_protocols import Condition
from torch import Tensor

from distill_adapters_z_image.kind import TEXT, TEXT_MASK

ENCODER = "transformers.models.qwen3.modeling_qwen3:Qwen3Model"
PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""What Qwen3's own template makes of one message with thinking enabled."""


def encode_prompts(encoders: TextEncoders, prompts: Sequence[str], length: int) -> Condition:
    """Encode to ``text`` [B, length, D], zeros beyond the prompt, and ``text_mask`` [B, length].

    Raises:
        ConditioningError: no prompts.
        WeightsError: as ``TextEncoders.loaded``.
    """

    def embed(text: LoadedEncoder, prompt: str, device: torch.device) -> Tensor:
        tokens = text.tokenizer(
            PROMPT.format(prompt),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        mask = tokens.attention_mask.bool()
        output = text.encoder(tokens.input_ids, mask, output_hidden_states=True)
        return output.hidden_states[-2][mask]

    hidden, mask = encoders.embed_each(prompts, length, embed)
    return Condition({TEXT: hidden, TEXT_MASK: mask})
