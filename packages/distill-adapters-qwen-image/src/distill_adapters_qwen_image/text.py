"""Prompts to conditions, as ``QwenImagePipeline.encode_prompt`` makes them of one prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from distill_diffusers.components.encoders import TextEncoders
from distill_protocols import ConditioningError
from torch import Tensor
from torch.nn import functional

from distill_adapters_qwen_image.kind import TEXT, TEXT_MASK
from distill_adapters_qwen_image.published import MAX_TEXT_TOKENS

ENCODER = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VLForConditionalGeneration"
PROMPT = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""What the model was trained to read (QwenImagePipeline.prompt_template_encode)."""
PREFIX_TOKENS = 34
"""Tokens before the prompt itself, whose embeddings are dropped."""


@torch.no_grad()
def encode_prompts(
    encoders: TextEncoders, prompts: Sequence[str], length: int, device: torch.device
) -> dict[str, Tensor]:
    """Encode to ``text`` [B, length, D], zeros beyond the prompt, and ``text_mask`` [B, length].

    One prompt is encoded at a time, without padding: a row is what the pipeline makes of that
    prompt bit for bit, whatever stands beside it, and no padding is computed.

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
                max_length=MAX_TEXT_TOKENS + PREFIX_TOKENS,
                truncation=True,
                return_tensors="pt",
            ).to(device)
            # The model below the head: logits over the vocabulary are not needed.
            output = text.encoder.model(tokens.input_ids, attention_mask=tokens.attention_mask)
            row = output.last_hidden_state[0, PREFIX_TOKENS:][:length].float()
            rows.append(functional.pad(row, (0, 0, 0, length - len(row))))
            masks.append((torch.arange(length, device=device) < len(row)).float())
    return {TEXT: torch.stack(rows), TEXT_MASK: torch.stack(masks)}
