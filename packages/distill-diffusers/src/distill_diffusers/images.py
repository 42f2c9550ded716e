"""The adapter that an image model with diffusers' ``AutoencoderKL`` inherits from.

An image is a clip of one frame: latents are [B, C, 1, H, W] in the framework and [B, C, H, W] in
the model. A family writes ``DiffusersFamily.call_model`` and ``condition_rows``, and here
``encode_condition`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from distill_protocols import Condition, ModelBundle, RoleHandle
from torch import Tensor

from distill_diffusers.adapter import (
    FlowMatchingAdapter,
    LatentStatistics,
    VelocityCall,
    device_of,
)
from distill_diffusers.architecture import patch_size
from distill_diffusers.calls.conditions import read_condition
from distill_diffusers.calls.features import FeatureLayout
from distill_diffusers.components.codec import ImageCodec
from distill_diffusers.components.encoders import TextEncoders
from distill_diffusers.family import DiffusersConfig, DiffusersFamily
from distill_diffusers.folders import fetch
from distill_diffusers.model_configs import read_config

ConfigT = TypeVar("ConfigT", bound=DiffusersConfig)


class ImageAdapter(FlowMatchingAdapter):
    """``DistillAdapter`` of an image model whose VAE is an ``AutoencoderKL``.

    Args:
        bundle: the run's roles.
        family: its plugin.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of the VAE.
        encoders: see ``FlowMatchingAdapter``.

    Raises:
        WeightsError: ``source`` has no VAE configuration; or no transformer, and neither has the
            bundle.
    """

    blocks: ClassVar[str] = "transformer_blocks"
    """The module list whose entries give hidden states."""
    block_output: ClassVar[int | None] = None
    """See ``FeatureLayout.output``."""

    def __init__(
        self,
        bundle: ModelBundle,
        family: DiffusersFamily[ConfigT],
        config: ConfigT,
        *,
        source: str,
        encoders: TextEncoders | None,
    ) -> None:
        vae = read_config(fetch(source, ("vae",)) / "vae" / "config.json")
        info, device = family.latent_info(vae), device_of(bundle)
        models: list[Any] = [
            module
            for role in bundle.roles.values()
            if role.discriminator is None
            for module in role.modules.values()
        ]
        self.transformer: Mapping[str, Any] = (
            dict(models[0].config) if models else family.describe(source).main
        )
        """Configuration of the run's transformers, of ``source`` where there are no roles."""
        self._family: DiffusersFamily[Any] = family
        self.condition_rows = family.condition_rows(self.transformer, config)
        """By name, the shape of one row of each tensor of a condition."""
        self._factor: float = vae["scaling_factor"]
        self._shift: float = vae.get("shift_factor") or 0.0
        super().__init__(
            bundle,
            kind=family.kind,
            capabilities=family.capabilities(config),
            latent_shape=info.shape(1, config.height, config.width),
            statistics=LatentStatistics.of_channels(
                [self._shift] * info.channels, [1 / self._factor] * info.channels
            ),
            codec=ImageCodec(family.kind.vae, source, strides=(1, info.stride_hw), device=device),
            encoders=encoders,
            batch_guidance=config.cfg_batched,
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
        """See ``FlowMatchingAdapter.predict_velocity``; the call is the family's ``call_model``."""
        tensors = read_condition(cond, self.condition_rows, x_t.device)
        return self._family.call_model(role, {"latents": x_t, "t": t, **tensors}).float()

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """z / f + m, as the pipelines of such a VAE compute it."""
        return latents.float() / self._factor + self._shift

    def feature_layout(self, role: RoleHandle, module: str, x_t: Tensor) -> FeatureLayout:
        """See ``FlowMatchingAdapter.feature_layout``."""
        _, height, width = patch_size(self.transformer)
        patches = (1, x_t.shape[3] // height, x_t.shape[4] // width)
        return FeatureLayout(blocks=self.blocks, patches=patches, output=self.block_output)
