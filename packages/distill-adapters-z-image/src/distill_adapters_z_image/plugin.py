"""The family as an app sees it before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from distill_diffusers.descriptions import LatentInfo, ModelDescription
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.fingerprints import text_settings
from distill_diffusers.model_configs import read_integer
from distill_protocols import CaptionTokens, RoleSpec

from distill_adapters_z_image.config import ZImageConfig
from distill_adapters_z_image.kind import (
    TEXT,
    TEXT_MASK,
    Z_IMAGE,
    clip_problems,
    latent_info,
    unsupported,
)
from distill_adapters_z_image.published import PATCH, PUBLISHED, TEXT_WIDTH

if TYPE_CHECKING:
    from distill_diffusers.architecture import Architecture
    from distill_protocols import DistillAdapter, Exporter, ModelBundle, RoleHandle
    from torch import Tensor


class ZImageFamily(DiffusersFamily[ZImageConfig]):
    """Z-Image from text, as ``ZImagePipeline`` calls it. A picture is a clip of one frame."""

    name = "z_image"
    contract = 2
    help = "Z-Image and Z-Image-Turbo, from Diffusers-format folders or hub ids"
    config_class = ZImageConfig
    kind = Z_IMAGE
    published = PUBLISHED

    def unsupported(self, model: ModelDescription, config: ZImageConfig) -> Iterator[str]:
        return unsupported(model)

    def clip_problems(
        self, config: ZImageConfig, latents: LatentInfo, transformer: Mapping[str, object]
    ) -> Iterator[str]:
        return clip_problems(latents, transformer)

    def latent_info(self, vae: Mapping[str, object]) -> LatentInfo:
        return latent_info(vae)

    def tokens(
        self, architecture: Architecture, latents: tuple[int, int, int, int]
    ) -> tuple[int, int, int]:
        return 1, latents[2] // PATCH, latents[3] // PATCH

    def latent_tokens(self, config: ZImageConfig, *, source: str) -> int | None:
        """Count tokens of 2 x 2 latent cells."""
        shape = self.latent_shape(config, source=source)
        return None if shape is None else (shape[2] // PATCH) * (shape[3] // PATCH)

    def condition_rows(
        self, transformer: Mapping[str, object], config: ZImageConfig
    ) -> Mapping[str, tuple[int, ...]]:
        """Give ``text`` [L, D] and ``text_mask`` [L]."""
        length = config.max_sequence_length
        width = read_integer(transformer, "cap_feat_dim", TEXT_WIDTH)
        return {TEXT: (length, width), TEXT_MASK: (length,)}

    def call_shapes(
        self, role: RoleSpec, config: ZImageConfig, latents: tuple[int, int, int, int]
    ) -> Mapping[str, tuple[int, ...]] | None:
        """Give those of the longest texts: a mask has no numbers in a plan."""
        shapes = super().call_shapes(role, config, latents)
        return shapes and {name: shape for name, shape in shapes.items() if name != TEXT_MASK}

    def export_formats(self) -> Mapping[str, str]:
        return {**super().export_formats(), "comfyui": "one file under the names that ComfyUI has"}

    def text_settings(self, config: ZImageConfig) -> Mapping[str, object]:
        return text_settings(config.max_sequence_length, config.text_encoder_precision)

    def count_tokens(
        self, config: ZImageConfig, captions: Sequence[str], *, source: str
    ) -> CaptionTokens | None:
        """Count tokens of the turns that are made of ``captions``."""
        from distill_adapters_z_image.text import PROMPT

        prompts = [PROMPT.format(caption) for caption in captions]
        return super().count_tokens(config, prompts, source=source)

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        from distill_adapters_z_image.adapter import call_transformer

        return call_transformer(role, inputs)

    def adapter(self, bundle: ModelBundle, config: ZImageConfig, *, source: str) -> DistillAdapter:
        from distill_adapters_z_image.adapter import ZImageAdapter

        return ZImageAdapter(bundle, self, config, source=source)

    def exporter(self, config: ZImageConfig, *, source: str) -> Exporter:
        from distill_adapters_z_image.export import ZImageExporter

        return ZImageExporter(self, config, source=source)


PLUGIN = ZImageFamily()
