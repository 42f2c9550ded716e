"""The family as an app sees it before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from attrs import evolve
from distill_diffusers.descriptions import LatentInfo, ModelDescription
from distill_diffusers.family import CAPABILITIES, DiffusersFamily
from distill_diffusers.fingerprints import text_settings
from distill_diffusers.model_configs import read_integer
from distill_protocols import Capabilities, Fingerprint, FrameConditions, RoleSpec, WeightsError

from distill_adapters_ltx.config import LTXPipelineConfig
from distill_adapters_ltx.kind import (
    LTX,
    PIPELINE,
    TEXT,
    TEXT_MASK,
    clip_problems,
    frame_conditions,
    padding_entry,
    unsupported,
)
from distill_adapters_ltx.published import PUBLISHED

if TYPE_CHECKING:
    from distill_protocols import DistillAdapter, Exporter, ModelBundle, RoleHandle
    from torch import Tensor


class LtxFamily(DiffusersFamily[LTXPipelineConfig]):
    """LTX-Video from text and from given frames, as its pipelines call it, on diffusers' own
    modules."""

    name = "ltx"
    contract = 2
    help = "LTX-Video 0.9.0 to 0.9.8, from Diffusers-format folders or hub ids"
    config_class = LTXPipelineConfig
    kind = LTX
    published = PUBLISHED

    def capabilities(self, config: LTXPipelineConfig) -> Capabilities:
        return evolve(CAPABILITIES, supports_frame_times=True, supports_image_condition=True)

    def frame_conditions(self, role: RoleSpec, config: LTXPipelineConfig) -> FrameConditions:
        """Give first frames, and of a model of ``LTXConditionPipeline`` the last one."""
        if role.heads is not None:
            return FrameConditions()
        try:
            return frame_conditions(self.describe(role.path).call_options[PIPELINE])
        except WeightsError:
            return FrameConditions()

    def unsupported(self, model: ModelDescription, config: LTXPipelineConfig) -> Iterator[str]:
        return unsupported(model)

    def clip_problems(
        self, config: LTXPipelineConfig, latents: LatentInfo, transformer: Mapping[str, object]
    ) -> Iterator[str]:
        return clip_problems(latents, transformer)

    def latent_info(self, vae: Mapping[str, object]) -> LatentInfo:
        return LatentInfo.of_ltx_vae(vae, (True, True, True, False))

    def latent_tokens(self, config: LTXPipelineConfig, *, source: str) -> int | None:
        """Count latent cells: each is one token."""
        shape = self.latent_shape(config, source=source)
        return None if shape is None else shape[1] * shape[2] * shape[3]

    def frame_rate(self, config: LTXPipelineConfig, *, source: str) -> float | None:
        return config.frame_rate

    def condition_rows(
        self, transformer: Mapping[str, object], config: LTXPipelineConfig
    ) -> Mapping[str, tuple[int, ...]]:
        """Give ``text`` [L, D] and ``text_mask`` [L]."""
        length = config.max_sequence_length
        width = read_integer(transformer, "caption_channels", 4096)
        return {TEXT: (length, width), TEXT_MASK: (length,)}

    def text_settings(self, config: LTXPipelineConfig) -> Mapping[str, object]:
        return text_settings(config.max_sequence_length, config.text_encoder_precision)

    def fingerprint(self, config: LTXPipelineConfig, *, source: str) -> Fingerprint:
        """Name what ``DiffusersFamily`` does, and whether T5 attends to the padding."""
        fingerprint = super().fingerprint(config, source=source)
        try:
            return {**fingerprint, **padding_entry(self.describe(source).call_options[PIPELINE])}
        except WeightsError:
            return fingerprint

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        from distill_adapters_ltx.adapter import call_transformer

        return call_transformer(role, **inputs, frame_rate=25.0)

    def adapter(
        self, bundle: ModelBundle, config: LTXPipelineConfig, *, source: str
    ) -> DistillAdapter:
        from distill_adapters_ltx.adapter import LtxAdapter

        return LtxAdapter(bundle, self, config, source=source)

    def exporter(self, config: LTXPipelineConfig, *, source: str) -> Exporter:
        from distill_adapters_ltx.export import LtxExporter

        return LtxExporter(self, config, source=source)


PLUGIN = LtxFamily()
