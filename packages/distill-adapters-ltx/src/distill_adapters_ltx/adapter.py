"""How an LTX-Video model is called: packed tokens, a masked text, guidance as LTXPipeline has it.

What is true of any flow-matching model is in ``distill_diffusers.adapter``.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from distill_diffusers.adapter import device_of
from distill_diffusers.calls.flow import rescale_guidance
from distill_diffusers.calls.precision import call_in_precision
from distill_diffusers.calls.tokens import pack, unpack
from distill_diffusers.components.encoders import TextEncoders
from distill_diffusers.components.statistics import LatentStatistics
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.family_adapter import FamilyAdapter
from distill_protocols import Condition, ModelBundle, RoleHandle
from torch import Tensor

from distill_adapters_ltx.codec import LtxCodec
from distill_adapters_ltx.config import LTXPipelineConfig
from distill_adapters_ltx.kind import LTX, TEXT, TEXT_MASK
from distill_adapters_ltx.published import STRIDE_HW, STRIDE_T


class LtxAdapter(FamilyAdapter):
    """``DistillAdapter`` of LTX-Video; a condition is ``text`` [B, L, D] and ``text_mask`` [B, L].

    Args:
        bundle: roles, each with a module ``transformer`` or, of a discriminator, ``heads``.
        family: ``PLUGIN``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of VAE, text encoder and tokenizer.

    Raises:
        WeightsError: the VAE of ``source`` is missing or damaged, or does not fit a role.
    """

    pipeline_batches_guidance = True

    def __init__(
        self,
        bundle: ModelBundle,
        family: DiffusersFamily[LTXPipelineConfig],
        config: LTXPipelineConfig,
        *,
        source: str,
    ) -> None:
        device = device_of(bundle)
        self._config = config
        self._text = TextEncoders.single(
            source,
            "transformers.models.t5.modeling_t5:T5EncoderModel",
            length=config.max_sequence_length,
            precision=config.text_encoder_precision,
            device=device,
        )
        super().__init__(
            bundle,
            family,
            config,
            source=source,
            statistics=LatentStatistics.of_buffers(source),
            encoders=self._text,
            codec=LtxCodec(source, config, device=device),
        )

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        """See ``FamilyAdapter.call_model``; positions are in seconds."""
        return call_transformer(role, **inputs, frame_rate=self._config.frame_rate)

    def combine_guidance(
        self, cond: Tensor, uncond: Tensor, w: float, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Guide and rescale, as ``LTXPipeline`` does; see ``rescale_guidance``."""
        guided = super().combine_guidance(cond, uncond, w, x_t, t)
        factor = self._config.guidance_rescale
        return rescale_guidance(guided, cond, factor) if factor > 0 else guided

    def to_model_layout(self, latents: Tensor) -> Tensor:
        """Cut latents into tokens [B, L, C]."""
        return pack(latents)

    def from_model_layout(self, latents: Tensor) -> Tensor:
        """Put tokens of one of the run's clips together."""
        return unpack(latents, self.latent_shape[1:])

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """Encode prompts as ``LTXPipeline.encode_prompt`` does: T5 attends to the padding, and the
        transformer does not."""
        length = self._config.max_sequence_length
        text, mask = self._text.embed(raw_cond, length, attend_padding=True)
        return Condition({TEXT: text, TEXT_MASK: mask})


def call_transformer(
    role: RoleHandle,
    latents: Tensor,
    t: Tensor,
    text: Tensor,
    text_mask: Tensor,
    *,
    frame_rate: float,
) -> Tensor:
    """Return v of x_t, both [B, C, T, H, W], in the precision of the role.

    Args:
        latents: x_t.
        t: [B].
        text: [B, L, D].
        text_mask: [B, L], 1 at tokens that are attended to.
        frame_rate: frames a second.
    """
    frames, height, width = size = (latents.shape[2], latents.shape[3], latents.shape[4])
    positions = token_positions(size, frame_rate, device=latents.device)
    with call_in_precision(role, LTX.modules[0], LTX, latents.device) as dtype:
        (tokens,) = role.modules[LTX.modules[0]](
            hidden_states=pack(latents).to(dtype),
            encoder_hidden_states=text.to(dtype),
            timestep=t.float(),
            encoder_attention_mask=text_mask,
            num_frames=frames,
            height=height,
            width=width,
            video_coords=positions.expand(len(latents), -1, -1),
            return_dict=False,
        )
    return unpack(tokens, size)


def token_positions(
    size: tuple[int, int, int], frame_rate: float, *, device: torch.device
) -> Tensor:
    """Compute time (s), height and width (pixels) of each token: ``video_coords`` [1, 3, L], fp32.

    The first latent frame holds one frame, every other eight. ``LTXPipeline`` counts eight for the
    first as well: latent frame i is at frame 8 i.

    Args:
        size: T, H and W of the latents.
        frame_rate: frames a second.
    """
    frames, height, width = (torch.arange(n, dtype=torch.float32, device=device) for n in size)
    seconds = frames * (STRIDE_T / frame_rate)
    grid = torch.meshgrid(seconds, height * STRIDE_HW, width * STRIDE_HW, indexing="ij")
    return torch.stack(grid).flatten(1)[None]
