"""Prompts to conditions, through the pipeline's own functions: their templates are in no file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import HunyuanVideo15Pipeline
from distill_diffusers.components.encoders import TextEncoderPart, TextEncoders, without_padding
from distill_protocols import DTYPES, Condition, ConditioningError, Precision

from distill_adapters_hunyuan.video15.kind import GLYPH_MASK, GLYPHS, TEXT, TEXT_MASK


def text_parts(precision: Precision) -> list[TextEncoderPart]:
    """Describe Qwen2.5-VL's text model, in ``precision``, and ByT5, always in fp32."""
    return [
        TextEncoderPart(
            model="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl:Qwen2_5_VLTextModel",
            dtype=DTYPES[precision],
        ),
        TextEncoderPart(
            model="transformers.models.t5.modeling_t5:T5EncoderModel",
            encoder="text_encoder_2",
            tokenizer="tokenizer_2",
        ),
    ]


@torch.no_grad()
def encode_prompts(
    encoders: TextEncoders, prompts: Sequence[str], *, length: int, glyphs: int
) -> Condition:
    """Encode to ``text`` [B, length, D], ``glyphs`` [B, glyphs, D'] and their masks, fp32.

    Raises:
        ConditioningError: no prompts.
    """
    if not prompts:
        raise ConditioningError("no prompts to encode; give one a sample (it may be empty)")
    with encoders.loaded("text_encoder") as qwen:
        text, text_mask = HunyuanVideo15Pipeline._get_mllm_prompt_embeds(
            qwen.encoder,
            qwen.tokenizer,  # type: ignore[arg-type] - of another class in tests
            list(prompts),
            qwen.encoder.device,
            tokenizer_max_length=length,
        )
    with encoders.loaded("text_encoder_2") as byt5:
        quoted, quoted_mask = HunyuanVideo15Pipeline._get_byt5_prompt_embeds(
            byt5.tokenizer,  # type: ignore[arg-type]
            byt5.encoder,
            list(prompts),
            byt5.encoder.device,
            tokenizer_max_length=glyphs,
        )
    text, text_mask = without_padding(text, text_mask)
    quoted, quoted_mask = without_padding(quoted, quoted_mask)
    return Condition({TEXT: text, TEXT_MASK: text_mask, GLYPHS: quoted, GLYPH_MASK: quoted_mask})
