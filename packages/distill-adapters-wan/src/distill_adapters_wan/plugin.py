"""The family as an app sees it before torch is imported."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar

from distill_diffusers.descriptions import LatentInfo, ModelDescription
from distill_diffusers.family import DiffusersFamily
from distill_diffusers.fingerprints import image_fingerprint, text_settings
from distill_diffusers.folders import locate
from distill_diffusers.model_configs import read_config, read_integer
from distill_protocols import (
    Capabilities,
    Chunk,
    ExportRequest,
    Fingerprint,
    ForeignNames,
    FrameConditions,
    Problem,
    RoleSpec,
    WeightsError,
)
from distill_protocols.plugins import EMPTY

from distill_adapters_wan.capabilities import capabilities_of
from distill_adapters_wan.causal.config import causal_problems
from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.experts import boundary_of, module_ranges, stated_ratio
from distill_adapters_wan.images.shapes import (
    CLIP_TOKENS,
    EMBEDS,
    LATENTS,
    TEXT,
    ImageKind,
    clip_tokens,
    frame_conditions,
    image_kind,
    needed_shapes,
)
from distill_adapters_wan.kind import WAN
from distill_adapters_wan.names import fastvideo as fastvideo_names
from distill_adapters_wan.names import original as original_names
from distill_adapters_wan.published import PUBLISHED
from distill_adapters_wan.shape import clip_problems, latent_info, pair_problem, unsupported

if TYPE_CHECKING:
    from distill_protocols import DistillAdapter, Exporter, ModelBundle, RoleHandle
    from torch import Tensor


class WanFamily(DiffusersFamily[WanPipelineConfig]):
    """Wan 2.1 and 2.2, from text and from given frames, on diffusers' own modules."""

    name = "wan"
    contract = 2
    help = "Wan 2.1 and 2.2, from Diffusers-format folders or hub ids"
    config_class: ClassVar[type] = WanPipelineConfig
    kind = WAN
    published = PUBLISHED
    original_folders: ClassVar[Mapping[str, str]] = {
        "transformer": "high_noise_model",
        "transformer_2": "low_noise_model",
    }

    def original_name(self, name: str) -> str:
        return original_names.to_original(name)

    def capabilities(self, config: WanPipelineConfig) -> Capabilities:
        return capabilities_of(config)

    # -- what is wrong with a run -------------------------------------------------------------

    def unsupported(self, model: ModelDescription, config: WanPipelineConfig) -> Iterator[str]:
        return unsupported(model, config.boundary_ratio)

    def clip_problems(
        self, config: WanPipelineConfig, latents: LatentInfo, transformer: Mapping[str, object]
    ) -> Iterator[str]:
        return clip_problems(config, latents, transformer)

    def fit_problems(
        self, role: RoleSpec, config: WanPipelineConfig, model: ModelDescription
    ) -> Iterator[str]:
        """Report where clip and image encoder do not fit, and where a causal role's model cannot
        be causal."""
        yield from super().fit_problems(role, config, model)
        tokens = _clip_tokens(config.components or role.path)
        if (problem := pair_problem(model.main, tokens)) is not None:
            yield problem
        if config.causal is not None and role.name in config.causal.roles:
            for transformer in model.transformers.values():
                yield from causal_problems(config.causal, transformer)

    def config_problems(
        self, config: WanPipelineConfig, roles: Collection[str]
    ) -> Iterator[Problem]:
        """Report causal roles that are none of the run's."""
        yield from super().config_problems(config, roles)
        if stray := sorted(self.capabilities(config).causal_roles.difference(roles)):
            yield Problem(
                "causal.roles",
                f"there is no role {', '.join(map(repr, stray))}; the run has "
                f"{', '.join(sorted(roles)) or 'none'}. Name one of those, or leave causal out if "
                "no role is causal",
            )

    def discriminator_problems(
        self, role: RoleSpec, config: WanPipelineConfig
    ) -> Iterator[Problem]:
        """Report blocks that the model does not have, and causal roles."""
        assert role.heads is not None
        causal = self.capabilities(config).causal_roles
        for name in sorted(causal & {role.name, role.heads.on}):
            yield Problem(
                "on",
                f"{name!r} is causal (causal.roles), and a discriminator reads whole clips. Put "
                "the heads on a role that is not",
            )
        yield from super().discriminator_problems(role, config)

    def export_problems(self, role: RoleSpec, request: ExportRequest) -> Iterator[Problem]:
        """Report, beside those of any role, what no reader of a flow map has."""
        yield from super().export_problems(role, request)
        if role.target_time is None:
            return
        if request.format != "diffusers":
            yield Problem(
                "format",
                f"{request.format!r} has no place for the second time embedder of {role.name!r}, "
                "which is a flow map. Use diffusers, whose AnyFlowPipeline has one",
            )
        if role.lora is not None:
            yield Problem(
                "role",
                f"{role.name!r} is a flow map and a LoRA, and its second time embedder is in no "
                "base that it could be merged into. Train it whole",
            )
        with suppress(WeightsError):  # nothing states how it is built: a problem of the path
            if (kind := _image_kind(self.describe(role.path))) != "none":
                yield Problem(
                    "role",
                    f"{role.name!r} reads given frames ({kind}), which AnyFlowPipeline gives its "
                    "transformer in another way. Keep its checkpoints, or train a text model",
                )

    def export_formats(self) -> Mapping[str, str]:
        return {**super().export_formats(), "comfyui": "one file under the model's original names"}

    # -- shapes and numbers, without weights --------------------------------------------------

    def latent_info(self, vae: Mapping[str, object]) -> LatentInfo:
        return latent_info(vae)

    def frame_rate(self, config: WanPipelineConfig, *, source: str) -> float | None:
        """Give 24 of TI2V-5B, which takes a first frame in its place, and 16 of the others."""
        try:
            model = self.describe(source)
        except WeightsError:
            return None
        return 24.0 if model.call_options["expand_timesteps"] else 16.0

    def condition_rows(
        self, transformer: Mapping[str, object], config: WanPipelineConfig
    ) -> Mapping[str, tuple[int, ...]]:
        return {TEXT: (config.max_sequence_length, read_integer(transformer, "text_dim", 4096))}

    def condition_shapes(
        self, config: WanPipelineConfig, *, source: str
    ) -> Mapping[str, tuple[int, ...]]:
        """Give ``text`` [L, D], and ``image_latents`` and, for Wan 2.1, ``image_embeds`` of an
        image-to-video model; of one of first and last frames ``image_mask``, too."""
        try:
            model = self.describe(source)
        except WeightsError:
            return EMPTY
        shapes = dict(self.condition_rows(model.main, config))
        components = config.components or source
        latents = self.latent_shape(config, source=components)
        if latents is None:
            return shapes
        tokens = _clip_tokens(components)
        return shapes | needed_shapes(model.main, _image_kind(model), latents, tokens)

    def chunks(self, role: RoleSpec, config: WanPipelineConfig, frames: int) -> tuple[Chunk, ...]:
        if config.causal is None or role.name not in config.causal.roles:
            return super().chunks(role, config, frames)
        return config.causal.chunks(frames)

    def text_settings(self, config: WanPipelineConfig) -> Mapping[str, object]:
        return text_settings(config.max_sequence_length, config.text_encoder_precision)

    def fingerprint(self, config: WanPipelineConfig, *, source: str) -> Fingerprint:
        return {**super().fingerprint(config, source=source), **image_fingerprint(source)}

    def frame_conditions(self, role: RoleSpec, config: WanPipelineConfig) -> FrameConditions:
        """Give the first frame of an image-to-video model, and the last one or further ones of
        those that read them."""
        if role.heads is not None:
            return FrameConditions()
        try:
            model = self.describe(role.path)
        except WeightsError:
            return FrameConditions()
        latents = self.latents(config.components or role.path)
        stride = latent_info({}).stride_t if latents is None else latents.stride_t
        return frame_conditions(model.main, _image_kind(model), stride)

    def expert_ranges(
        self, role: RoleSpec, config: WanPipelineConfig
    ) -> Mapping[str, tuple[float, float]]:
        """Give the ranges of Wan 2.2 A14B: ``transformer`` from the boundary on, ``transformer_2``
        below."""
        if role.heads is not None:
            return EMPTY  # a discriminator learns from both
        try:
            model = self.describe(role.path)
        except WeightsError:
            return EMPTY
        own = stated_ratio(model.call_options)
        boundary = boundary_of(model.transformers, own, config.boundary_ratio)
        return module_ranges(boundary, role.experts or model.transformers)

    def call_shapes(
        self, role: RoleSpec, config: WanPipelineConfig, latents: tuple[int, int, int, int]
    ) -> Mapping[str, tuple[int, ...]] | None:
        """Give the inputs of the transformer itself: latents with the channels of a picture, one t
        a clip or one a frame, text, the picture's embedding.

        A model that takes a first frame, if there is one, is planned with it: a time for each token
        then, which takes more. So does a role that is told the exit step of each frame.
        """
        condition = self.condition_shapes(config, source=role.path)
        if TEXT not in condition:
            return None
        model = self.describe(role.path)
        channels, *clip = latents
        by_frame = _image_kind(model) == "frame" or bool(role.exits and role.exits.by_frame)
        shapes = {
            "latents": (model.main.get("in_channels", channels), *clip),
            "t": (clip[0],) if by_frame else (),
            TEXT: condition[TEXT],
        }
        return shapes | {name: condition[name] for name in (EMBEDS,) if name in condition}

    def call_model(self, role: RoleHandle, inputs: Mapping[str, Tensor]) -> Tensor:
        from distill_adapters_wan.calling import call_transformer, transformer_of
        from distill_adapters_wan.causal.roles import token_times

        latents = inputs["latents"]
        times = token_times(transformer_of(role), latents, inputs["t"])
        return call_transformer(role, latents, times, inputs[TEXT], inputs.get(EMBEDS))

    # -- parts of a run -----------------------------------------------------------------------

    def adapter(
        self, bundle: ModelBundle, config: WanPipelineConfig, *, source: str
    ) -> DistillAdapter:
        from distill_adapters_wan.adapter import WanAdapter

        return WanAdapter(bundle, self, config, source=source)

    def exporter(self, config: WanPipelineConfig, *, source: str) -> Exporter:
        from distill_adapters_wan.export.exporter import WanExporter

        return WanExporter(self, config, source=source)

    def foreign_names(self) -> ForeignNames:
        """Give FastVideo's, Self-Forcing's and the original Wan's names."""
        return ForeignNames(
            ours=fastvideo_names.migrated,
            unused=fastvideo_names.unused,
            missing=fastvideo_names.missing,
        )

    def foreign_conditions(self, config: WanPipelineConfig, *, source: str) -> Mapping[str, str]:
        """Give FastVideo's names of the text, and of what an image-to-video model reads."""
        names = {"text_embedding": TEXT, "first_frame_latent": LATENTS, "clip_feature": EMBEDS}
        needed = self.condition_shapes(config, source=source)
        return {theirs: ours for theirs, ours in names.items() if ours in needed}


PLUGIN = WanFamily()


def _image_kind(model: ModelDescription) -> ImageKind:
    return image_kind(model.main, model.call_options["expand_timesteps"])


def _clip_tokens(source: str) -> int:
    """Count the tokens of the image encoder of ``source``; CLIP's where it is not here, or its
    configuration is damaged, which is a problem of the folder."""
    folder = locate(source)
    file = None if folder is None else folder / "image_encoder" / "config.json"
    if file is None or not file.is_file():
        return CLIP_TOKENS
    try:
        return clip_tokens(read_config(file))
    except WeightsError:
        return CLIP_TOKENS
