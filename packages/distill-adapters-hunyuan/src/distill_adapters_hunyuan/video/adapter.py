"""How a HunyuanVideo model is called: guidance is an input, as ``HunyuanVideoPipeline`` gives it.

What is true of any flow-matching model is in ``distill_diffusers.adapter``.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import evolve
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from distill_diffusers.adapter import VelocityCall, device_of
from distill_diffusers.calls.conditions import read_condition
from distill_diffusers.calls.features import Features
from distill_diffusers.calls.precision import call_in_precision
from distill_diffusers.components.encoders import TextEncoderPart, TextEncoders
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.images import ScaledLatentsAdapter
from distill_protocols import DTYPES, Condition, ModelBundle, RoleHandle
from torch import Tensor

from distill_adapters_hunyuan.video.config import HunyuanVideoConfig
from distill_adapters_hunyuan.video.kind import HUNYUAN_VIDEO, POOLED, TEXT, TEXT_MASK

LLAMA_LAYER = -3
"""Which of Llama's hidden states is the text: the last but two."""
CLIP_TOKENS = 77


class HunyuanVideoAdapter(ScaledLatentsAdapter):
    """``DistillAdapter`` of HunyuanVideo; a condition is ``text`` [B, L, D], ``text_mask`` [B, L]
    and ``pooled`` [B, P].

    Guidance of w is one call, whose transformer reads w. Without guidance (w = 1) it reads the
    config's ``embedded_guidance``; w = 0 is that of the negative condition.

    Args:
        bundle: roles, each with a module ``transformer`` or, of a discriminator, ``heads``.
        family: ``PLUGIN``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of VAE, text encoders and tokenizers.

    Raises:
        WeightsError: the VAE of ``source`` is missing or damaged, or does not fit a role.
    """

    block_output = 0

    def __init__(
        self,
        bundle: ModelBundle,
        family: DiffusersFamily[HunyuanVideoConfig],
        config: HunyuanVideoConfig,
        *,
        source: str,
    ) -> None:
        self._config = config
        dtype = DTYPES[config.text_encoder_precision]
        parts = [
            TextEncoderPart(
                model="transformers.models.llama.modeling_llama:LlamaModel", dtype=dtype
            ),
            TextEncoderPart(
                model="transformers.models.clip.modeling_clip:CLIPTextModel",
                encoder="text_encoder_2",
                tokenizer="tokenizer_2",
            ),
        ]
        self._text = TextEncoders(
            source, parts, settings=family.text_settings(config), device=device_of(bundle)
        )
        super().__init__(bundle, family, config, source=source, encoders=self._text)

    def guided_velocity(
        self,
        role: RoleHandle,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        neg_cond: Condition | None,
        w: float,
        *,
        call: VelocityCall,
        batched: bool = False,
        features: Features | None = None,
    ) -> Tensor:
        """See ``FlowMatchingAdapter.guided_velocity``: one call, whatever w."""
        if w == 0:
            return super().guided_velocity(role, x_t, t, cond, neg_cond, w, call=call)
        guided = evolve(call, guidance=None if w == 1 else w)
        return self.velocity(role, x_t, t, cond, guided, features=features)

    def predict_velocity(
        self,
        role: RoleHandle,
        module: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        call: VelocityCall,
    ) -> Tensor:
        """See ``FlowMatchingAdapter.predict_velocity``."""
        tensors = read_condition(cond, self.condition_rows, x_t.device)
        w = self._config.embedded_guidance if call.guidance is None else call.guidance
        return call_transformer(role, x_t, t, **tensors, guidance=w).float()

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """Encode prompts as ``HunyuanVideoPipeline.encode_prompt`` does: Llama reads them in a
        template, whose tokens are left out."""
        template, skip = DEFAULT_PROMPT_TEMPLATE["template"], DEFAULT_PROMPT_TEMPLATE["crop_start"]
        text, mask = self._text.embed(
            [str(template).format(prompt) for prompt in raw_cond],
            self._config.max_sequence_length,
            attend_padding=False,
            layer=LLAMA_LAYER,
            skip=int(skip),
        )
        pooled = self._text.outputs("text_encoder_2", raw_cond, length=CLIP_TOKENS).pooler_output
        return Condition({TEXT: text, TEXT_MASK: mask, POOLED: pooled.float()})


def call_transformer(
    role: RoleHandle,
    latents: Tensor,
    t: Tensor,
    text: Tensor,
    text_mask: Tensor,
    pooled: Tensor,
    *,
    guidance: float,
) -> Tensor:
    """Return v of x_t, both [B, C, T, H, W], in the precision of the role.

    Args:
        latents: x_t.
        t: [B].
        text: [B, L, D].
        text_mask: [B, L], 1 at tokens that are attended to.
        pooled: [B, P].
        guidance: w; the transformer reads 1000 w.
    """
    rows = latents.shape[0]
    with call_in_precision(role, HUNYUAN_VIDEO.modules[0], HUNYUAN_VIDEO, latents.device) as dtype:
        # Rounded before it is multiplied, as the pipeline does: 6 is 6016 in bf16 either way, but
        # other w are not.
        w = torch.full((rows,), guidance, dtype=dtype, device=latents.device) * 1000.0
        (v,) = role.modules[HUNYUAN_VIDEO.modules[0]](
            hidden_states=latents.to(dtype),
            timestep=t.float(),
            encoder_hidden_states=text.to(dtype),
            encoder_attention_mask=text_mask.to(dtype),
            pooled_projections=pooled.to(dtype),
            guidance=w,
            return_dict=False,
        )
    return v
