"""How an LTX-Video model is called: packed tokens, a masked text, guidance as LTXPipeline has it.

What is true of any flow-matching model is in ``distill_diffusers.adapter``.

Letters: B batch, C channels, T latent frames, H and W latent height and width, L text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from distill_diffusers.adapter import FlowMatchingAdapter, VelocityCall, device_of
from distill_diffusers.calls.features import FeatureLayout
from distill_diffusers.folders import fetch, read_json
from distill_protocols import (
    Condition,
    ConditioningError,
    ModelBundle,
    RoleHandle,
    WeightsError,
)
from torch import Tensor

from distill_adapters_ltx.calling import call_transformer, transformer_of
from distill_adapters_ltx.codec import LtxCodec, latent_statistics
from distill_adapters_ltx.config import LTXPipelineConfig
from distill_adapters_ltx.guidance import rescale_guidance
from distill_adapters_ltx.kind import (
    CAPABILITIES,
    LTX,
    TEXT,
    TEXT_MASK,
    fit_problems,
    latent_info,
)
from distill_adapters_ltx.latents import denormalize, normalize
from distill_adapters_ltx.packing import pack, unpack
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
        vae = read_json(vae_folder / "config.json")
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
        """See ``latents.normalize``; fp32, or fp64 of fp64."""
        wide = latents if latents.dtype == torch.float64 else latents.float()
        mean, std = self._statistics.mean, self._statistics.std
        return normalize(wide, mean, std, self._scaling_factor)

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """See ``latents.denormalize``; fp32, or fp64 of fp64."""
        wide = latents if latents.dtype == torch.float64 else latents.float()
        mean, std = self._statistics.mean, self._statistics.std
        return denormalize(wide, mean, std, self._scaling_factor)

    def encode_condition(self, raw_cond: Sequence[str]) -> Condition:
        """See ``encode_text``."""
        return encode_text(self._text, raw_cond, self._config.max_sequence_length)

    def _check_condition(self, role: RoleHandle, cond: Condition) -> None:
        length = self._config.max_sequence_length
        width = transformer_of(role).config["caption_channels"]
        for name, expected in ((TEXT, (length, width)), (TEXT_MASK, (length,))):
            if name not in cond.tensors:
                raise ConditioningError(
                    f"the condition holds {sorted(cond.tensors)}, but LTX reads {TEXT!r} [B, L, D] "
                    f"and {TEXT_MASK!r} [B, L]; rebuild the data set with this family's encoder"
                )
            if tuple(cond.tensors[name].shape[1:]) != expected:
                sizes = ", ".join(map(str, expected))
                raise ConditioningError(
                    f"{name!r} is {list(cond.tensors[name].shape)}, it must be [B, {sizes}] "
                    "(max_sequence_length, the model's caption_channels): T5 attends to the "
                    "padding, so a prompt of another length has other embeddings. Make "
                    "max_sequence_length the data set's, or encode the data again"
                )
