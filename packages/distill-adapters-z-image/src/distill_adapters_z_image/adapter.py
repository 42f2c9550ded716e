"""How a Z-Image model is called: lists of pictures and texts, time that rises, a negated output.

What is true of any flow-matching model is in ``distill_diffusers.adapter``.

Letters: B batch, C channels, H and W latent height and width, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from distill_diffusers.adapter import VelocityCall, device_of
from distill_diffusers.calls import flow
from distill_diffusers.calls.features import FeatureLayout, Features
from distill_diffusers.calls.precision import call_in_precision
from distill_diffusers.components.encoders import TextEncoders
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.images import ImageAdapter
from distill_protocols import Condition, ModelBundle, RoleHandle
from torch import Tensor

from distill_adapters_z_image.config import ZImageConfig
from distill_adapters_z_image.kind import TEXT, TEXT_MASK, Z_IMAGE
from distill_adapters_z_image.published import PATCH
from distill_adapters_z_image.text import ENCODER, encode_prompts


class ZImageAdapter(ImageAdapter):
    """``DistillAdapter`` of Z-Image; a condition is ``text`` [B, L, D] and ``text_mask`` [B, L].

    Args:
        bundle: roles, each with a module ``transformer`` or, of a discriminator, ``heads``.
        family: ``PLUGIN``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of VAE, text encoder and tokenizer.

    Raises:
        WeightsError: the VAE of ``source`` is missing or damaged, or does not fit a role.
    """

    pipeline_batches_guidance = True
    blocks = "layers"

    def __init__(
        self,
        bundle: ModelBundle,
        family: DiffusersFamily[ZImageConfig],
        config: ZImageConfig,
        *,
        source: str,
    ) -> None:
        self._config = config
        self._text = TextEncoders.single(
            source,
            ENCODER,
            length=config.max_sequence_length,
            precision=config.text_encoder_precision,
            device=device_of(bundle),
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
        """See ``FlowMatchingAdapter.guided_velocity``; one call where all guidance is cut off."""
        # Asked of the config first: of t on a device the host would wait for the answer.
        cut_off = self._config.cfg_truncation < 1
        if cut_off and w not in (0, 1) and bool(self._is_late(t).all()):
            w = 1
        return super().guided_velocity(
            role, x_t, t, cond, neg_cond, w, call=call, batched=batched, features=features
        )

    def combine_guidance(
        self, cond: Tensor, uncond: Tensor, w: float, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Guide, limit the norm and cut off late guidance, in the pipeline's order of operations:
        its guidance_scale is w - 1."""
        cond, uncond = flow.widen(cond), flow.widen(uncond)
        guided = cond + (w - 1) * (cond - uncond)
        if self._config.cfg_normalization > 0:
            guided = limit_norm(guided, cond, self._config.cfg_normalization)
        late = self._is_late(t).to(cond.device)
        return torch.where(late.view(-1, 1, 1, 1, 1), cond, guided)

    def feature_layout(self, role: RoleHandle, module: str, x_t: Tensor) -> FeatureLayout:
        """See ``FlowMatchingAdapter.feature_layout``; the text follows the picture."""
        patches = [1, *(n // PATCH for n in x_t.shape[3:])]
        return FeatureLayout(blocks=self.blocks, patches=patches, others_follow=True)

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """Encode prompts; see ``encode_prompts``."""
        length = self._config.max_sequence_length
        return encode_prompts(self._text, raw_cond, length)

    def _is_late(self, t: Tensor) -> Tensor:
        """Tell of each t [B] whether guidance is cut off there."""
        return (1000 - t.float()) / 1000 > self._config.cfg_truncation


def call_transformer(role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return v of x_t, both [B, C, 1, H, W], in the precision of the role.

    Args:
        inputs: ``latents``, which are x_t; ``t`` [B]; ``text`` [B, L, D]; and ``text_mask`` [B, L],
            1 at the tokens of a prompt, which come first; left out where all are.
    """
    latents, text = inputs["latents"], inputs[TEXT]
    mask = inputs.get(TEXT_MASK)
    # Texts have lengths of their own, which the host must know: the model pads them by itself, with
    # embeddings that it has learned.
    lengths = [text.shape[1]] * len(text) if mask is None else mask.sum(dim=1).int().tolist()
    module = Z_IMAGE.modules[0]
    with call_in_precision(role, module, Z_IMAGE, latents.device) as dtype:
        (pictures,) = role.modules[module](
            list(latents.to(dtype).unbind()),
            (1000 - inputs["t"].float()) / 1000,
            [row[:length] for row, length in zip(text.to(dtype), lengths, strict=True)],
            return_dict=False,
        )
    return -torch.stack(pictures)


def limit_norm(guided: Tensor, cond: Tensor, factor: float) -> Tensor:
    """Scale each guided prediction down to ``factor`` times the norm of the conditional one.

    Source: diffusers, ``ZImagePipeline.__call__`` (cfg_normalization).

    Args:
        guided, cond: [B, ...].
    """
    of_cond, of_guided = (
        torch.stack([torch.linalg.vector_norm(row) for row in x]).view(-1, *[1] * (x.dim() - 1))
        for x in (cond, guided)
    )
    most = of_cond * factor
    return torch.where(of_guided > most, guided * (most / of_guided), guided)
