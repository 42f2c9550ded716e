"""The family as an app sees it before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from attrs import evolve
from distill_diffusers.descriptions import LatentInfo, ModelDescription
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.fingerprints import module_fingerprint, text_settings
from distill_protocols import Capabilities, Fingerprint, RoleSpec

from distill_adapters_ltx2.config import LTX2PipelineConfig
from distill_adapters_ltx2.kind import (
    AUDIO,
    CONNECTORS,
    LTX2,
    VIDEO,
    clip_problems,
    part_shapes,
    text_rows,
    unsupported,
)
from distill_adapters_ltx2.published import PUBLISHED

if TYPE_CHECKING:
    from distill_protocols import (
        DistillAdapter,
        Exporter,
        LatentShape,
        ModelBundle,
        PartShapes,
        RoleHandle,
    )
    from torch import Tensor


class Ltx2Family(DiffusersFamily[LTX2PipelineConfig]):
    """LTX-2 and LTX-2.3 from text, with or without sound, as ``LTX2Pipeline`` calls them."""

    name = "ltx2"
    contract = 2
    help = "LTX-2 and LTX-2.3, pictures with or without sound, from Diffusers-format folders"
    config_class = LTX2PipelineConfig
    kind = LTX2
    published = PUBLISHED

    def capabilities(self, config: LTX2PipelineConfig) -> Capabilities:
        own = evolve(super().capabilities(config), solvers=frozenset({"euler"}))
        if not config.audio:
            return own
        # Hidden states, derivatives and exit steps are of one tensor.
        return evolve(
            own,
            supports_latent_parts=True,
            supports_features=False,
            supports_jvp=False,
            supports_exits=False,
        )

    def unsupported(self, model: ModelDescription, config: LTX2PipelineConfig) -> Iterator[str]:
        return unsupported(model.main)

    def clip_problems(
        self, config: LTX2PipelineConfig, latents: LatentInfo, transformer: Mapping[str, object]
    ) -> Iterator[str]:
        return clip_problems(config, latents, transformer)

    def latent_info(self, vae: Mapping[str, object]) -> LatentInfo:
        return LatentInfo.of_ltx_vae(vae, (True,) * 4)

    def latent_tokens(self, config: LTX2PipelineConfig, *, source: str) -> int | None:
        """Count latent cells of the pictures: each is one token."""
        shape = self.latent_shape(config, source=source)
        return None if shape is None else shape[1] * shape[2] * shape[3]

    def frame_rate(self, config: LTX2PipelineConfig, *, source: str) -> float | None:
        return config.frame_rate

    def condition_rows(
        self, transformer: Mapping[str, object], config: LTX2PipelineConfig
    ) -> Mapping[str, tuple[int, ...]]:
        """Give ``text`` [L, D], ``text_mask`` [L] and, with sound, ``audio_text`` [L, D']."""
        return text_rows(transformer, config)

    def part_shapes(
        self, config: LTX2PipelineConfig, latents: LatentShape, *, source: str
    ) -> PartShapes:
        """Give those of pictures and sound, where a clip has sound."""
        if not config.audio:
            return {}
        return part_shapes(latents, self.describe(source).main, config)

    def call_shapes(
        self, role: RoleSpec, config: LTX2PipelineConfig, latents: LatentShape
    ) -> Mapping[str, tuple[int, ...]] | None:
        """Give those of ``DiffusersFamily``, and of the sound."""
        shapes = super().call_shapes(role, config, latents)
        parts = self.part_shapes(config, latents, source=role.path)
        return {**shapes, AUDIO: parts[AUDIO]} if shapes and parts else shapes

    def text_settings(self, config: LTX2PipelineConfig) -> Mapping[str, object]:
        return text_settings(config.max_sequence_length, config.text_encoder_precision)

    def fingerprint(self, config: LTX2PipelineConfig, *, source: str) -> Fingerprint:
        """Name what ``DiffusersFamily`` does, and the connectors."""
        own = super().fingerprint(config, source=source)
        return {**own, **module_fingerprint(source, CONNECTORS)}

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        from distill_protocols import flatten_parts

        from distill_adapters_ltx2.adapter import call_transformer

        latents = {VIDEO: inputs["latents"]}
        if AUDIO in inputs:
            latents[AUDIO] = inputs[AUDIO]
        velocities = call_transformer(role, latents, inputs["t"], inputs, frame_rate=24.0)
        return flatten_parts(velocities) if AUDIO in inputs else velocities.main

    def adapter(
        self, bundle: ModelBundle, config: LTX2PipelineConfig, *, source: str
    ) -> DistillAdapter:
        from distill_adapters_ltx2.adapter import Ltx2Adapter

        return Ltx2Adapter(bundle, self, config, source=source)

    def exporter(self, config: LTX2PipelineConfig, *, source: str) -> Exporter:
        from distill_adapters_ltx2.export import Ltx2Exporter

        return Ltx2Exporter(self, config, source=source)


PLUGIN = Ltx2Family()
