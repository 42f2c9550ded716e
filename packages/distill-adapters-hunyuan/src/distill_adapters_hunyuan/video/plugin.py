"""The family as an app sees it before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from attrs import evolve
from distill_diffusers.descriptions import LatentInfo, ModelDescription
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.fingerprints import text_settings
from distill_diffusers.model_configs import read_integer
from distill_protocols import Capabilities

from distill_adapters_hunyuan.video.config import HunyuanVideoConfig
from distill_adapters_hunyuan.video.kind import (
    HUNYUAN_VIDEO,
    POOLED,
    PUBLISHED,
    TEXT,
    TEXT_MASK,
    clip_problems,
    latent_info,
    unsupported,
)

if TYPE_CHECKING:
    from distill_protocols import DistillAdapter, Exporter, ModelBundle, RoleHandle
    from torch import Tensor


class HunyuanVideoFamily(DiffusersFamily[HunyuanVideoConfig]):
    """HunyuanVideo from text, as ``HunyuanVideoPipeline`` calls it, on diffusers' own modules."""

    name = "hunyuan_video"
    contract = 2
    help = "HunyuanVideo (text to video), from Diffusers-format folders or hub ids"
    config_class = HunyuanVideoConfig
    kind = HUNYUAN_VIDEO
    published = PUBLISHED

    def capabilities(self, config: HunyuanVideoConfig) -> Capabilities:
        """Give those of every family here; guidance is an input of the transformer."""
        return evolve(super().capabilities(config), embeds_guidance=True)

    def unsupported(self, model: ModelDescription, config: HunyuanVideoConfig) -> Iterator[str]:
        return unsupported(model)

    def clip_problems(
        self, config: HunyuanVideoConfig, latents: LatentInfo, transformer: Mapping[str, object]
    ) -> Iterator[str]:
        return clip_problems(latents, transformer)

    def latent_info(self, vae: Mapping[str, object]) -> LatentInfo:
        return latent_info(vae, channels=16, stride_hw=8)

    def frame_rate(self, config: HunyuanVideoConfig, *, source: str) -> float | None:
        """Give 24, which the models were trained on."""
        return 24.0

    def condition_rows(
        self, transformer: Mapping[str, object], config: HunyuanVideoConfig
    ) -> Mapping[str, tuple[int, ...]]:
        """Give ``text`` [L, D], ``text_mask`` [L] and ``pooled`` [P]."""
        length = config.max_sequence_length
        return {
            TEXT: (length, read_integer(transformer, "text_embed_dim", 4096)),
            TEXT_MASK: (length,),
            POOLED: (read_integer(transformer, "pooled_projection_dim", 768),),
        }

    def text_settings(self, config: HunyuanVideoConfig) -> Mapping[str, object]:
        return text_settings(config.max_sequence_length, config.text_encoder_precision)

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        from distill_adapters_hunyuan.video.adapter import call_transformer

        return call_transformer(role, **inputs, guidance=1.0)

    def adapter(
        self, bundle: ModelBundle, config: HunyuanVideoConfig, *, source: str
    ) -> DistillAdapter:
        from distill_adapters_hunyuan.video.adapter import HunyuanVideoAdapter

        return HunyuanVideoAdapter(bundle, self, config, source=source)

    def exporter(self, config: HunyuanVideoConfig, *, source: str) -> Exporter:
        from distill_adapters_hunyuan.video.export import HunyuanVideoExporter

        return HunyuanVideoExporter(self, config, source=source)


PLUGIN = HunyuanVideoFamily()
