"""The family as an app sees it before torch is imported."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from attrs import evolve
from distill_diffusers.descriptions import LatentInfo, ModelDescription
from distill_diffusers.family import ROLE_OPTIONS, DiffusersFamily
from distill_diffusers.fingerprints import text_settings
from distill_diffusers.model_configs import read_integer
from distill_protocols import Capabilities, FrameConditions, RoleSpec

from distill_adapters_longcat.config import LongCatPipelineConfig
from distill_adapters_longcat.kind import (
    LONGCAT,
    PATCH,
    TEXT,
    TEXT_MASK,
    clip_problems,
    frame_conditions,
    unsupported,
)
from distill_adapters_longcat.published import FRAME_RATE, PUBLISHED

if TYPE_CHECKING:
    from distill_protocols import DistillAdapter, Exporter, ModelBundle, RoleHandle
    from torch import Tensor


class LongCatFamily(DiffusersFamily[LongCatPipelineConfig]):
    """LongCat-Video from text, a first frame or the frames of a clip that it continues."""

    name = "longcat"
    contract = 2
    help = "LongCat-Video 13.6B, from folders of its own layout or hub ids"
    config_class = LongCatPipelineConfig
    kind = LONGCAT
    published = PUBLISHED

    def capabilities(self, config: LongCatPipelineConfig) -> Capabilities:
        """Add a time for each frame and pictures; the original code has Euler's method alone."""
        return evolve(
            super().capabilities(config),
            supports_frame_times=True,
            supports_image_condition=True,
            solvers=frozenset({"euler"}),
        )

    def role_options(self, config: LongCatPipelineConfig) -> Collection[str]:
        """Leave out kernels: the transformer has torch's own attention."""
        return ROLE_OPTIONS - {"attention_backend"}

    def attention_backends(self, role: RoleSpec, config: LongCatPipelineConfig) -> Collection[str]:
        return ()

    def unsupported(self, model: ModelDescription, config: LongCatPipelineConfig) -> Iterator[str]:
        return unsupported(model)

    def clip_problems(
        self, config: LongCatPipelineConfig, latents: LatentInfo, transformer: Mapping[str, object]
    ) -> Iterator[str]:
        return clip_problems(latents, transformer)

    def latent_info(self, vae: Mapping[str, object]) -> LatentInfo:
        return LatentInfo.of_wan_vae(vae)

    def latent_tokens(self, config: LongCatPipelineConfig, *, source: str) -> int | None:
        shape = self.latent_shape(config, source=source)
        if shape is None:
            return None
        _, frames, height, width = shape
        return frames * (height // PATCH[1]) * (width // PATCH[2])

    def frame_rate(self, config: LongCatPipelineConfig, *, source: str) -> float | None:
        return FRAME_RATE

    def condition_rows(
        self, transformer: Mapping[str, object], config: LongCatPipelineConfig
    ) -> Mapping[str, tuple[int, ...]]:
        """Give ``text`` [L, D] and ``text_mask`` [L]; frames may be given or not."""
        length = config.max_sequence_length
        return {
            TEXT: (length, read_integer(transformer, "caption_channels", 4096)),
            TEXT_MASK: (length,),
        }

    def frame_conditions(self, role: RoleSpec, config: LongCatPipelineConfig) -> FrameConditions:
        if role.heads is not None:
            return FrameConditions()
        latents = self.latents(config.components or role.path)
        return frame_conditions(config.frame_unit if latents is None else latents.stride_t)

    def text_settings(self, config: LongCatPipelineConfig) -> Mapping[str, object]:
        return text_settings(config.max_sequence_length, config.text_encoder_precision)

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        from distill_adapters_longcat.calling import call_transformer

        return call_transformer(
            role, inputs["latents"], inputs["t"], inputs[TEXT], inputs[TEXT_MASK]
        )

    def adapter(
        self, bundle: ModelBundle, config: LongCatPipelineConfig, *, source: str
    ) -> DistillAdapter:
        from distill_adapters_longcat.adapter import LongCatAdapter

        return LongCatAdapter(bundle, self, config, source=source)

    def exporter(self, config: LongCatPipelineConfig, *, source: str) -> Exporter:
        from distill_adapters_longcat.export import LongCatExporter

        return LongCatExporter(self, config, source=source)


PLUGIN = LongCatFamily()
