"""The family as an app sees it before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from attrs import evolve
from distill_diffusers.descriptions import LatentInfo, ModelDescription
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.fingerprints import image_fingerprint, text_settings
from distill_diffusers.model_configs import read_integer
from distill_protocols import Capabilities, Fingerprint, FrameConditions, RoleSpec, WeightsError
from distill_protocols.plugins import EMPTY

from distill_adapters_hunyuan.video.kind import latent_info
from distill_adapters_hunyuan.video15.config import HunyuanVideo15Config
from distill_adapters_hunyuan.video15.kind import (
    GLYPH_MASK,
    GLYPHS,
    HUNYUAN_VIDEO15,
    PUBLISHED,
    TEXT,
    TEXT_MASK,
    clip_problems,
    image_shapes,
    reads_image,
    role_problem,
    unsupported,
)

if TYPE_CHECKING:
    from distill_protocols import DistillAdapter, Exporter, ModelBundle, RoleHandle
    from torch import Tensor


class HunyuanVideo15Family(DiffusersFamily[HunyuanVideo15Config]):
    """HunyuanVideo 1.5, from text and from a first frame, on diffusers' own modules."""

    name = "hunyuan_video15"
    contract = 2
    help = "HunyuanVideo 1.5, from Diffusers-format folders or hub ids"
    config_class = HunyuanVideo15Config
    kind = HUNYUAN_VIDEO15
    planned_kind = evolve(
        HUNYUAN_VIDEO15, transformer="distill_adapters_hunyuan.video15.planning:PlannedTransformer"
    )
    published = PUBLISHED

    def capabilities(self, config: HunyuanVideo15Config) -> Capabilities:
        return evolve(super().capabilities(config), supports_image_condition=True)

    def unsupported(self, model: ModelDescription, config: HunyuanVideo15Config) -> Iterator[str]:
        return unsupported(model)

    def fit_problems(
        self, role: RoleSpec, config: HunyuanVideo15Config, model: ModelDescription
    ) -> Iterator[str]:
        yield from super().fit_problems(role, config, model)
        if problem := role_problem(role, model):
            yield problem

    def clip_problems(
        self, config: HunyuanVideo15Config, latents: LatentInfo, transformer: Mapping[str, object]
    ) -> Iterator[str]:
        return clip_problems(latents, transformer)

    def latent_info(self, vae: Mapping[str, object]) -> LatentInfo:
        return latent_info(vae, channels=32, stride_hw=16)

    def frame_rate(self, config: HunyuanVideo15Config, *, source: str) -> float | None:
        """Give 24, which the models were trained on."""
        return 24.0

    def frame_conditions(self, role: RoleSpec, config: HunyuanVideo15Config) -> FrameConditions:
        """Give the first frame of an image-to-video model."""
        if role.heads is not None:
            return FrameConditions()
        try:
            is_read = reads_image(self.describe(role.path))
        except WeightsError:
            return FrameConditions()
        return FrameConditions(first="always" if is_read else "never")

    def condition_rows(
        self, transformer: Mapping[str, object], config: HunyuanVideo15Config
    ) -> Mapping[str, tuple[int, ...]]:
        """Give the shapes of both texts [L, D] and their masks [L]."""
        length, glyphs = config.max_sequence_length, config.glyph_sequence_length
        return {
            TEXT: (length, read_integer(transformer, "text_embed_dim", 3584)),
            TEXT_MASK: (length,),
            GLYPHS: (glyphs, read_integer(transformer, "text_embed_2_dim", 1472)),
            GLYPH_MASK: (glyphs,),
        }

    def condition_shapes(
        self, config: HunyuanVideo15Config, *, source: str
    ) -> Mapping[str, tuple[int, ...]]:
        """Give the texts', and of an image-to-video model those of a first frame."""
        try:
            model = self.describe(source)
        except WeightsError:
            return EMPTY
        shapes = dict(self.condition_rows(model.main, config))
        latents = self.latent_shape(config, source=config.components or source)
        if latents is not None and reads_image(model):
            shapes |= image_shapes(model.main, latents)
        return shapes

    def text_settings(self, config: HunyuanVideo15Config) -> Mapping[str, object]:
        return {
            **text_settings(config.max_sequence_length, config.text_encoder_precision),
            "text_encoder_2.length": config.glyph_sequence_length,
        }

    def fingerprint(self, config: HunyuanVideo15Config, *, source: str) -> Fingerprint:
        return {**super().fingerprint(config, source=source), **image_fingerprint(source)}

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        from distill_adapters_hunyuan.video15.calling import call_transformer

        return call_transformer(role, **inputs)

    def adapter(
        self, bundle: ModelBundle, config: HunyuanVideo15Config, *, source: str
    ) -> DistillAdapter:
        from distill_adapters_hunyuan.video15.adapter import HunyuanVideo15Adapter

        return HunyuanVideo15Adapter(bundle, self, config, source=source)

    def exporter(self, config: HunyuanVideo15Config, *, source: str) -> Exporter:
        from distill_adapters_hunyuan.video15.export import HunyuanVideo15Exporter

        return HunyuanVideo15Exporter(self, config, source=source)


PLUGIN = HunyuanVideo15Family()
