"""How an LTX-Video model is called: packed tokens, a masked text, guidance as LTXPipeline has it.

What is true of any flow-matching model is in ``distill_diffusers.adapter``.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel
from distill_diffusers.adapter import FlowMatchingAdapter, VelocityCall, device_of
from distill_diffusers.calls.features import FeatureLayout
from distill_diffusers.calls.precision import call_in_precision
from distill_diffusers.folders import fetch
from distill_diffusers.model_configs import read_config
from distill_protocols import (
    Condition,
    ConditioningError,
    ModelBundle,
    RoleHandle,
    WeightsError,
)
from torch import Tensor

from distill_adapters_ltx.arithmetic import (
    denormalize,
    normalize,
    pack,
    rescale_guidance,
    token_positions,
    unpack,
)
from distill_adapters_ltx.codec import LtxCodec, latent_statistics
from distill_adapters_ltx.config import LTXPipelineConfig
from distill_adapters_ltx.kind import (
    CAPABILITIES,
    LTX,
    TEXT,
    TEXT_MASK,
    fit_problems,
    latent_info,
)
from distill_adapters_ltx.text import encode_text, ltx_encoders


class LtxAdapter(FlowMatchingAdapter):
    """``DistillAdapter`` of LTX-Video; a condition is ``text`` [B, L, D] and ``text_mask`` [B, L].

    Args:
        bundle: roles, each with a module ``transformer`` or, of a discriminator, ``heads``.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of VAE, text encoder and tokenizer.

    Raises:
        WeightsError: the VAE of ``source`` is missing or damaged, or does not fit a role.
    """

    pipeline_batches_guidance = True

    def __init__(self, bundle: ModelBundle, config: LTXPipelineConfig, *, source: str) -> None:
        vae_folder = fetch(source, ("vae",)) / "vae"
        vae = read_config(vae_folder / "config.json")
        info = latent_info(vae)
        for name, role in bundle.roles.items():
            if role.discriminator is None:
                for problem in fit_problems(info, transformer_of(role).config):
                    raise WeightsError(f"role {name!r} and the VAE of {source}: {problem}")
        device = device_of(bundle)
        encoders = ltx_encoders(source, config, device=device)
        super().__init__(
            bundle,
            kind=LTX,
            capabilities=CAPABILITIES,
            latent_shape=info.shape(config.num_frames, config.height, config.width),
            statistics=latent_statistics(vae_folder),
            codec=LtxCodec(source, config, device=device),
            encoders=encoders,
            batch_guidance=config.cfg_batched,
        )
        self._config = config
        self._scaling_factor: float = vae.get("scaling_factor", 1.0)
        self._text = encoders

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
        self._check_condition(role, cond)
        text, mask = cond.tensors[TEXT], cond.tensors[TEXT_MASK]
        v = call_transformer(role, x_t, t, text, mask, frame_rate=self._config.frame_rate)
        return v.float()

    def combine_guidance(
        self, cond: Tensor, uncond: Tensor, w: float, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """Guide and rescale, as ``LTXPipeline`` does; see ``rescale_guidance``."""
        guided = super().combine_guidance(cond, uncond, w, x_t, t)
        factor = self._config.guidance_rescale
        return rescale_guidance(guided, cond, factor) if factor > 0 else guided

    def feature_layout(self, role: RoleHandle, module: str, x_t: Tensor) -> FeatureLayout:
        """See ``FlowMatchingAdapter.feature_layout``."""
        return FeatureLayout(blocks="transformer_blocks", patches=x_t.shape[2:])

    def to_model_layout(self, latents: Tensor) -> Tensor:
        """Cut latents into tokens [B, L, C]."""
        return pack(latents)

    def from_model_layout(self, latents: Tensor) -> Tensor:
        """Put tokens of one of the run's clips together."""
        return unpack(latents, self.latent_shape[1:])

    def normalize_latents(self, latents: Tensor) -> Tensor:
        """See ``arithmetic.normalize``; fp32, or fp64 of fp64."""
        wide = latents if latents.dtype == torch.float64 else latents.float()
        return normalize(wide, self._statistics.mean, self._statistics.std, self._scaling_factor)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """See ``arithmetic.denormalize``; fp32, or fp64 of fp64."""
        wide = latents if latents.dtype == torch.float64 else latents.float()
        return denormalize(wide, self._statistics.mean, self._statistics.std, self._scaling_factor)

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """See ``encode_text``."""
        return encode_text(self._text, raw_cond, self._config.max_sequence_length)

    def _check_condition(self, role: RoleHandle, cond: Condition) -> None:
        length = self._config.max_sequence_length
        width = transformer_of(role).config["caption_channels"]
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in cond.tensors.items()}
        expected = {TEXT: (length, width), TEXT_MASK: (length,)}
        if {name: shapes.get(name) for name in expected} != expected:
            raise ConditioningError(
                f"a row of the condition is {shapes}, it must hold {expected} (max_sequence_length,"
                " the model's caption_channels): T5 attends to the padding, so a prompt of another "
                "length has other embeddings. Make max_sequence_length the data set's, or encode "
                "the data again with this family"
            )


def transformer_of(role: RoleHandle) -> LTXVideoTransformer3DModel:
    """Return the role's transformer."""
    return cast(LTXVideoTransformer3DModel, role.modules[LTX.modules[0]])


def call_transformer(
    role: RoleHandle, x_t: Tensor, t: Tensor, text: Tensor, mask: Tensor, *, frame_rate: float
) -> Tensor:
    """Return v [B, C, T, H, W] in the precision of the role, for the adapter and for plans.

    Args:
        x_t: [B, C, T, H, W].
        t: [B].
        text: [B, L, D].
        mask: [B, L], 1 at tokens that are attended to.
        frame_rate: frames a second.
    """
    frames, height, width = size = (x_t.shape[2], x_t.shape[3], x_t.shape[4])
    positions = token_positions(size, frame_rate, device=x_t.device)
    with call_in_precision(role, LTX.modules[0], LTX, x_t.device) as dtype:
        (tokens,) = transformer_of(role)(
            hidden_states=pack(x_t).to(dtype),
            encoder_hidden_states=text.to(x_t.device, dtype),
            timestep=t.float(),
            encoder_attention_mask=mask.to(x_t.device),
            num_frames=frames,
            height=height,
            width=width,
            video_coords=positions.expand(len(x_t), -1, -1),
            return_dict=False,
        )
    return unpack(tokens, size)
