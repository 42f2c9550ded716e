"""The adapters of models whose VAE has one scaling factor: video models, and image models with
diffusers' ``AutoencoderKL``.

An image is a clip of one frame: latents are [B, C, 1, H, W] in the framework and [B, C, H, W] in
the model. A family writes ``DiffusersFamily.call_model`` and ``condition_rows``, and here
``encode_condition`` alone.
"""

from __future__ import annotations

from typing import TypeVar

from distill_protocols import ModelBundle
from torch import Tensor

from distill_diffusers.calls import flow
from distill_diffusers.components.codec import ImageCodec
from distill_diffusers.components.encoders import TextEncoders
from distill_diffusers.components.statistics import LatentStatistics
from distill_diffusers.family import DiffusersConfig, DiffusersFamily
from distill_diffusers.family_adapter import FamilyAdapter
from distill_diffusers.folders import fetch
from distill_diffusers.model_configs import read_config, read_number

ConfigT = TypeVar("ConfigT", bound=DiffusersConfig)


class ScaledLatentsAdapter(FamilyAdapter):
    """``DistillAdapter`` of a model whose latents are ``(z - shift_factor) scaling_factor``.

    Args:
        bundle: the run's roles.
        family: its plugin.
        config: the run's ``pipeline_config``.
        source: Diffusers folder or hub id of VAE and encoders.
        encoders: see ``FlowMatchingAdapter``.

    Raises:
        WeightsError: as ``FamilyAdapter``; or the VAE has no scaling factor.
    """

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
        channels = family.latent_info(vae).channels
        self._factor = read_number(vae, "scaling_factor")
        self._shift = read_number(vae, "shift_factor", 0.0)
        super().__init__(
            bundle,
            family,
            config,
            source=source,
            statistics=LatentStatistics.of_channels(
                [self._shift] * channels, [1 / self._factor] * channels
            ),
            encoders=encoders,
        )

    def denormalize_latents(self, latents: Tensor) -> Tensor:
        """z / f + m, as the pipelines of such a VAE compute it."""
        return flow.widen(latents) / self._factor + self._shift


class ImageAdapter(ScaledLatentsAdapter):
    """``DistillAdapter`` of an image model whose VAE is an ``AutoencoderKL``."""

    codec_class = ImageCodec
