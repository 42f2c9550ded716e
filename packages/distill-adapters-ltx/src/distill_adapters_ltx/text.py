"""T5 as LTX reads it: prompts to padded embeddings and their mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from distill_diffusers.components.encoders import TextEncoderPart, TextEncoders
from distill_protocols import DTYPES, Condition, ConditioningError

from distill_adapters_ltx.config import LTXPipelineConfig
from distill_adapters_ltx.kind import TEXT, TEXT_MASK


def ltx_encoders(source: str, config: LTXPipelineConfig, *, device: torch.device) -> TextEncoders:
    """Describe T5 and its tokenizer in the folder or hub id ``source``."""
    part = TextEncoderPart(
        model="transformers.models.t5.modeling_t5:T5EncoderModel",
        dtype=DTYPES[config.text_encoder_precision],
    )
    return TextEncoders(source, [part], settings=config.text_settings, device=device)


@torch.no_grad()
def encode_text(encoders: TextEncoders, prompts: Sequence[str], length: int) -> Condition:
    """Encode to ``text`` [B, length, D] and ``text_mask`` [B, length], both fp32.

    As ``LTXPipeline.encode_prompt`` does: the encoder attends to the padding, the transformer does
    not. Embeddings of the padding have no effect, and are 0 here.

    Raises:
        ConditioningError: no prompts.
    """
    if not prompts:
        raise ConditioningError("no prompts to encode; give one a sample (it may be empty)")
    with encoders.loaded() as text:
        tokens = text.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(encoders.device)
        hidden = text.encoder(tokens.input_ids).last_hidden_state.float()
    mask = tokens.attention_mask
    # where, not a product: 0 * nan or inf of a masked position would stay nan.
    return Condition({TEXT: torch.where(mask[..., None] > 0, hidden, 0.0), TEXT_MASK: mask.float()})
