"""How a Qwen-Image model is called: 2 x 2 cells a token, a masked text, rescaled guidance.

What is true of any flow-matching model is in ``distill_diffusers.adapter``.

Letters: B batch, C channels, H and W latent height and width, N tokens of the picture, L of text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from distill_diffusers.adapter import VelocityCall, device_of
from distill_diffusers.calls import flow, tokens
from distill_diffusers.calls.conditions import read_condition
from distill_diffusers.calls.precision import call_in_precision
from distill_diffusers.components.encoders import TextEncoders
from distill_diffusers.components.statistics import LatentStatistics
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.family_adapter import FamilyAdapter
from distill_protocols import Condition, ModelBundle, RoleHandle
from torch import Tensor
from torch.nn import functional

from distill_adapters_qwen_image.config import QwenImageConfig
from distill_adapters_qwen_image.kind import QWEN_IMAGE, TEXT, TEXT_MASK
from distill_adapters_qwen_image.published import PATCH
from distill_adapters_qwen_image.text import ENCODER, encode_prompts


class QwenImageAdapter(FamilyAdapter):
    """``DistillAdapter`` of Qwen-Image; a condition is ``text`` [B, L, D], ``text_mask`` [B, L].

    Args:
        bundle: roles, each with a module ``transformer`` or, of a discriminator, ``heads``.
        family: ``PLUGIN``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of VAE, text encoder and tokenizer.

    Raises:
        WeightsError: the VAE of ``source`` is missing or damaged, or does not fit a role.
    """

    block_output = 1  # blocks return text first

    def __init__(
        self,
        bundle: ModelBundle,
        family: DiffusersFamily[QwenImageConfig],
        config: QwenImageConfig,
        *,
        source: str,
    ) -> None:
        self._length = config.max_sequence_length
        self._text = TextEncoders.single(
            source,
            ENCODER,
            length=self._length,
            precision=config.text_encoder_precision,
            device=device_of(bundle),
        )
        super().__init__(
            bundle,
            family,
            config,
            source=source,
            statistics=LatentStatistics.of_config(source),
            encoders=self._text,
        )

    def predict_velocity(
        self,
        role: RoleHandle,
        module: str,
        x_t: Tensor,
        t: Tensor,
        cond: Condition,
        call: VelocityCall,
    ) -> Tensor:
        """See ``FlowMatchingAdapter.predict_velocity``.

        Samplers and rollouts cut the padding that all rows share, and the mask where nothing is
        left to hide, as ``QwenImagePipeline`` does: attention over a masked text rounds otherwise.
        All other calls have one shape, and the host never waits for the mask.
        """
        tensors = read_condition(cond, self.condition_rows, x_t.device)
        inputs: dict[str, Tensor] = {"latents": x_t, "t": t, **tensors}
        if call.like_pipeline:
            inputs |= cut_padding(inputs.pop(TEXT), inputs.pop(TEXT_MASK))
        return self.call_model(role, inputs).float()

    def combine_guidance(
        self, cond: Tensor, uncond: Tensor, w: float, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Guide, and give each token back the norm of its conditional prediction."""
        guided = pack(super().combine_guidance(cond, uncond, w, x_t, t))
        return unpack(rescale_to_norm(guided, pack(flow.widen(cond))), cond.shape)

    def to_model_layout(self, latents: Tensor) -> Tensor:
        """Cut latents into tokens [B, N, 4 C]."""
        return pack(latents)

    def from_model_layout(self, latents: Tensor) -> Tensor:
        """Put tokens of one of the run's pictures together."""
        return unpack(latents, self.latent_shape)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """Divide by 1 / std and add the mean, as ``QwenImagePipeline`` does."""
        wide = flow.widen(latents)
        return wide / (1.0 / self._statistics.std.to(wide)) + self._statistics.mean.to(wide)

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """Encode prompts; see ``encode_prompts``."""
        return encode_prompts(self._text, raw_cond, self._length)


def call_transformer(role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return v of x_t, both [B, C, 1, H, W], in the precision of the role.

    The transformer itself rounds t to the type of its activations, in training as in the pipeline.

    Args:
        inputs: ``latents``, which are x_t; ``t`` [B]; ``text`` [B, L, D]; and ``text_mask`` [B, L],
            1 at tokens that are attended to, left out where all are.
    """
    latents = inputs["latents"]
    batch, _, _, height, width = latents.shape
    mask = inputs.get(TEXT_MASK)
    module = QWEN_IMAGE.modules[0]
    with call_in_precision(role, module, QWEN_IMAGE, latents.device) as dtype:
        (patches,) = role.modules[module](
            hidden_states=pack(latents).to(dtype),
            encoder_hidden_states=inputs[TEXT].to(dtype),
            encoder_hidden_states_mask=None if mask is None else mask > 0,
            timestep=inputs["t"].float() / 1000,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * batch,
            return_dict=False,
        )
    return unpack(patches, latents.shape)


def pack(latents: Tensor) -> Tensor:
    """Cut latents [B, C, 1, H, W] into tokens of 2 x 2 cells [B, N, 4 C], N = H W / 4."""
    # Contiguous as in the pipeline: sums over the channels of a token round by their order.
    return tokens.pack(functional.pixel_unshuffle(latents.squeeze(2), PATCH)).contiguous()


def unpack(patches: Tensor, size: Sequence[int]) -> Tensor:
    """Put tokens [B, N, 4 C] together to latents [B, C, 1, H, W]; ``size`` ends with H and W."""
    grid = tokens.unpack(patches, [n // PATCH for n in size[-2:]])
    return functional.pixel_shuffle(grid, PATCH).unsqueeze(2)


def cut_padding(text: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Cut ``text`` [B, L, D] to the longest row; the mask is left out where it hides nothing."""
    longest = int(mask.sum(dim=1).max())
    text, mask = text[:, :longest], mask[:, :longest]
    return {TEXT: text} if bool(mask.all()) else {TEXT: text, TEXT_MASK: mask}


def rescale_to_norm(guided: Tensor, cond: Tensor) -> Tensor:
    """Scale each token of a guided prediction to the norm of the conditional one's, both [B, N, D].

    Source: diffusers, ``QwenImagePipeline.__call__`` (true classifier-free guidance).
    """
    norms = (torch.norm(x, dim=-1, keepdim=True) for x in (cond, guided))
    of_cond, of_guided = norms
    return guided * (of_cond / of_guided)
