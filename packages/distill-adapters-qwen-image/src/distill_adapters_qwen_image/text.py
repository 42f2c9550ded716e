"""Prompts to conditions, as ``QwenImagePipeline.encode_prompt`` makes them of one prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from distill_diffusers.components.encoders import LoadedEncoder, TextEncoders
from distill_protocols import Condition
from torch import Tensor

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


def encode_prompts(encoders: TextEncoders, prompts: Sequence[str], length: int) -> Condition:
    """Encode to ``text`` [B, length, D], zeros beyond the prompt, and ``text_mask`` [B, length].

    A prompt is encoded without padding: a row is what the pipeline makes of that prompt bit for
    bit, whatever stands beside it.

    Raises:
        ConditioningError: no prompts.
        WeightsError: as ``TextEncoders.loaded``.
    """

    def embed(text: LoadedEncoder, prompt: str, device: torch.device) -> Tensor:
        tokens = text.tokenizer(
            PROMPT.format(prompt),
            max_length=MAX_TEXT_TOKENS + PREFIX_TOKENS,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        # The model below the head: logits over the vocabulary are not needed.
        output = text.encoder.model(tokens.input_ids, attention_mask=tokens.attention_mask)
        return output.last_hidden_state[0, PREFIX_TOKENS:][:length]

    hidden, mask = encoders.embed_each(prompts, length, embed)
    return Condition({TEXT: hidden, TEXT_MASK: mask})
