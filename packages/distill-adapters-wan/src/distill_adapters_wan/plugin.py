"""The family as the app sees it before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from distill_protocols import (
    Capabilities,
    FamilyPlugin,
    ForeignNames,
    Problem,
    RoleSpec,
    WeightsError,
    below,
)
from distill_protocols.plugins import EMPTY

from distill_adapters_wan import fastvideo_names
from distill_adapters_wan.architecture import architecture, unknown_hub_id
from distill_adapters_wan.capabilities import capabilities_of
from distill_adapters_wan.causal_config import causal_problems
from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.experts import HIGH, boundary_of, module_ranges
from distill_adapters_wan.export_rules import FORMATS, export_problems
from distill_adapters_wan.folders import (
    DIFFUSERS_STEM,
    component_problems,
    folder_problem,
    is_hub_id,
    locate,
    module_problems,
    pipeline_problems,
    read_json,
)
from distill_adapters_wan.head_rules import head_problems
from distill_adapters_wan.image_shapes import (
    CLIP_TOKENS,
    EMBEDS,
    TEXT,
    clip_tokens,
    image_kind,
    needed_shapes,
)
from distill_adapters_wan.lora import target_problems
from distill_adapters_wan.published import PUBLISHED, LatentFacts
from distill_adapters_wan.shape import clip_problems, latent_facts, latent_shape, plain, unsupported

if TYPE_CHECKING:
    import torch
    from distill_protocols import (
        CallPlan,
        DistillAdapter,
        Exporter,
        ExportRequest,
        ModelBundle,
        RoleHandle,
        RolePlan,
        WeightSource,
    )


class WanFamily(FamilyPlugin[WanPipelineConfig]):
    """Wan 2.1 and 2.2, from text and from a first frame, on diffusers' own modules."""

    name = "wan"
    contract = 2
    help = "Wan 2.1 and 2.2, from Diffusers-format folders or hub ids"
    config_class: ClassVar[type] = WanPipelineConfig

    def capabilities(self, config: WanPipelineConfig) -> Capabilities:
        return capabilities_of(config)

    def role_options(self, config: WanPipelineConfig) -> frozenset[str]:
        return frozenset(
            ("activation_checkpointing", "base", "compile", "fsdp", "heads", "lora", "offload")
        )

    def export_formats(self) -> Mapping[str, str]:
        return FORMATS

    def components(self, config: WanPipelineConfig) -> str | None:
        return config.components

    def role_problems(self, role: RoleSpec, config: WanPipelineConfig) -> Iterator[Problem]:
        """Of its path, its LoRA and its discriminator."""
        if role.heads is not None:
            yield from below(self._discriminator_problems(role, config), "heads")
            return
        yield from (Problem("path", text) for text in self._path_problems(role, config))
        yield from below(self._lora_problems(role), "lora")

    def _path_problems(self, role: RoleSpec, config: WanPipelineConfig) -> Sequence[str]:
        """What is missing or damaged, and where clip and model do not fit. Reads no weights.

        A hub id that is not in the local cache is no problem if its numbers are published: the run
        can be planned, and ``load`` says what to download.
        """
        missing = list(_presence_problems(role.path, config))
        return missing or [*_fit_problems(role.path, config), *_causal_problems(role, config)]

    def config_problems(
        self, config: WanPipelineConfig, roles: Collection[str]
    ) -> Iterator[Problem]:
        """Causal roles that are none of the run's."""
        if stray := sorted(self.capabilities(config).causal_roles.difference(roles)):
            yield Problem(
                "causal.roles",
                f"there is no role {', '.join(map(repr, stray))}; the run has "
                f"{', '.join(sorted(roles)) or 'none'}. Name one of those, or leave "
                "pipeline_config.causal out if no role is causal",
            )

    def _lora_problems(self, role: RoleSpec) -> Iterator[Problem]:
        """Targets that name no linear layer of the role's model."""
        if role.lora is None:
            return
        with suppress(WeightsError):  # no architecture: `problems` says so, of the path
            transformers, _ = architecture(role.path)
            for config in transformers.values():
                yield from (
                    Problem("target_modules", text) for text in target_problems(config, role.lora)
                )

    def _discriminator_problems(
        self, role: RoleSpec, config: WanPipelineConfig
    ) -> Iterator[Problem]:
        """Blocks that the model does not have, and causal roles."""
        if role.heads is None:
            return
        causal = self.capabilities(config).causal_roles
        for name in sorted(causal & {role.name, role.heads.on}):
            yield Problem(
                "on",
                f"{name!r} is causal (pipeline_config.causal.roles), and a discriminator reads "
                "whole clips. Put the heads on a role that is not",
            )
        with suppress(WeightsError):  # no architecture: `problems` says so, of the path
            transformers, _ = architecture(role.path)
            yield from head_problems(transformers[HIGH], role.heads)

    def weights_problems(self, role: RoleSpec, path: str) -> Iterator[str]:
        """Numbers that differ, such as how many heads share one width."""
        with suppress(WeightsError):  # no architecture, or gone: names and shapes must do
            theirs, _ = architecture(path)
            ours, _ = architecture(role.path)
            for name in theirs.keys() & ours.keys():
                differ = _differences(theirs[name], ours[name])
                if differ:
                    yield (
                        f"{path} is another model than {role.path}: {name} has "
                        f"{'; '.join(differ)}. Its weights may fit, and would be called wrongly. "
                        "Name the path of the same model"
                    )

    def latent_shape(
        self, config: WanPipelineConfig, *, source: str
    ) -> tuple[int, int, int, int] | None:
        """(C, T, H, W) from the numbers of ``source``'s VAE; None where they are not known."""
        facts = _latents(source)
        return facts and latent_shape(config, facts)

    def condition_shapes(
        self, config: WanPipelineConfig, *, source: str
    ) -> Mapping[str, tuple[int, ...]]:
        """``text`` [L, D], and ``image_latents`` and, for Wan 2.1, ``image_embeds`` of an
        image-to-video model."""
        try:
            transformers, calling = architecture(source)
        except WeightsError:
            return EMPTY
        main = transformers["transformer"]
        shapes = {TEXT: (config.max_sequence_length, main.get("text_dim", 4096))}
        latents = _latents(config.components or source)
        if latents is None:
            return shapes
        kind = image_kind(main, calling.expand_timesteps)
        tokens = _clip_tokens(config.components or source)
        return shapes | needed_shapes(main, kind, latent_shape(config, latents), tokens)

    def needs_image(self, role: RoleSpec, config: WanPipelineConfig) -> bool:
        if role.heads is not None:
            return False
        try:
            transformers, calling = architecture(role.path)
        except WeightsError:
            return False
        return image_kind(transformers["transformer"], calling.expand_timesteps) == "channels"

    def expert_ranges(
        self, role: RoleSpec, config: WanPipelineConfig
    ) -> Mapping[str, tuple[float, float]]:
        """Of Wan 2.2 A14B: ``transformer`` above the boundary, ``transformer_2`` below."""
        if role.heads is not None:
            return EMPTY  # they learn from both
        try:
            transformers, calling = architecture(role.path)
        except WeightsError:
            return EMPTY
        return module_ranges(
            boundary_of(transformers, calling.boundary_ratio, config.boundary_ratio)
        )

    def plan(self, role: RoleSpec, config: WanPipelineConfig) -> RolePlan:
        """Modules and sizes, from the meta device.

        Raises:
            WeightsError: nothing says how the model is built.
        """
        from distill_protocols import RolePlan

        from distill_adapters_wan.planning import plan_modules

        transformers, _ = architecture(role.path)
        folder = locate(role.path)
        return RolePlan(
            role=role.name,
            source=role.path if role.heads is None else "drawn from the seed",
            modules=plan_modules(transformers, role),
            present=role.heads is not None
            or (folder is not None and not _weight_problems(folder, transformers)),
        )

    def plan_call(
        self,
        role: RoleSpec,
        config: WanPipelineConfig,
        *,
        source: str,
        batch: int,
        guided: bool = False,
        input_gradient: bool = False,
    ) -> CallPlan | None:
        """The real module on fake tensors, of two and of three blocks; see ``call_memory``.

        Of two experts it is either's call. A model that takes a first frame, if there is one, is
        planned with it: a time for each token then, which takes more.
        """
        latents = self.latent_shape(config, source=source)
        shapes = self.condition_shapes(config, source=role.path)
        if latents is None or TEXT not in shapes:
            return None
        from distill_adapters_wan.call_memory import plan_call, plan_heads_call

        transformers, calling = architecture(role.path)
        main = transformers[HIGH]
        if role.heads is not None:
            return plan_heads_call(main, role, latents=(batch, *latents))
        rows = 2 * batch if guided and config.cfg_batched else batch
        picture = shapes.get(EMBEDS)
        channels = main.get("in_channels", latents[0])
        return plan_call(
            main,
            role,
            latents=(rows, channels, *latents[1:]),
            text=(rows, *shapes[TEXT]),
            image=picture and (rows, *picture),
            frame_times=image_kind(main, calling.expand_timesteps) == "frame",
            judges=input_gradient,
        )

    def load(
        self,
        roles: Sequence[RoleSpec],
        config: WanPipelineConfig,
        *,
        device: torch.device,
        seed: int = 0,
        weights: Mapping[str, Mapping[str, WeightSource]] = EMPTY,
        shard: Callable[[RoleHandle], None] = lambda role: None,
    ) -> ModelBundle:
        from distill_adapters_wan.loading import load_bundle

        return load_bundle(
            roles,
            device=device,
            seed=seed,
            weights=weights,
            shard=shard,
            boundary_ratio=config.boundary_ratio,
        )

    def weights(self, path: str) -> Mapping[str, WeightSource]:
        from distill_adapters_wan.sources import folder_weights

        return folder_weights(path)

    def adapter(
        self, bundle: ModelBundle, config: WanPipelineConfig, *, source: str
    ) -> DistillAdapter:
        from distill_adapters_wan.adapter import WanAdapter

        return WanAdapter(bundle, config, source=source)

    def exporter(self, config: WanPipelineConfig, *, source: str) -> Exporter:
        from distill_adapters_wan.export import WanExporter

        return WanExporter(config, source=source)

    def foreign_names(self) -> ForeignNames:
        """FastVideo's, Self-Forcing's and the original Wan's."""
        return ForeignNames(
            ours=fastvideo_names.migrated,
            unused=fastvideo_names.unused,
            missing=fastvideo_names.missing,
        )

    def export_problems(self, role: RoleSpec, request: ExportRequest) -> Iterable[Problem]:
        return export_problems(role, request)


PLUGIN = WanFamily()


def _presence_problems(path: str, config: WanPipelineConfig) -> Iterator[str]:
    for place in filter(None, (path, config.components)):
        problem = folder_problem(place)
        if is_hub_id(place) and place not in PUBLISHED and locate(place) is None:
            problem = unknown_hub_id(place)
        if problem:
            yield problem if place == path else f"pipeline_config.components: {problem}"
    folder = locate(path)
    if folder is not None and not is_hub_id(path):
        yield from pipeline_problems(folder, components=config.components is None)
    components = config.components and locate(config.components)
    if components and not is_hub_id(str(config.components)):
        yield from component_problems(components)


def _fit_problems(path: str, config: WanPipelineConfig) -> Iterator[str]:
    try:
        transformers, calling = architecture(path)
        variants = list(unsupported(transformers, calling, config.boundary_ratio))
        if variants:
            yield from (f"{path}: {reason}" for reason in variants)
            return
        facts = _latents(config.components or path)
        if facts is not None:
            yield from clip_problems(config, facts, transformers["transformer"])
    except WeightsError as error:
        yield str(error)


def _causal_problems(role: RoleSpec, config: WanPipelineConfig) -> Iterator[str]:
    if config.causal is None or role.name not in config.causal.roles:
        return
    with suppress(WeightsError):  # `_fit_problems` says so
        transformers, _ = architecture(role.path)
        for transformer in transformers.values():
            yield from causal_problems(config.causal, transformer)


def _latents(source: str) -> LatentFacts | None:
    folder = locate(source)
    if folder is not None and (folder / "vae" / "config.json").is_file():
        return latent_facts(folder / "vae")
    return PUBLISHED[source].latents if source in PUBLISHED else None


def _clip_tokens(source: str) -> int:
    folder = locate(source)
    file = None if folder is None else folder / "image_encoder" / "config.json"
    return CLIP_TOKENS if file is None or not file.is_file() else clip_tokens(read_json(file))


def _weight_problems(folder: Path, transformers: Mapping[str, Any]) -> list[str]:
    return [f for name in transformers for f in module_problems(folder / name, DIFFUSERS_STEM)]


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Keys that both say, and differently; what begins with ``_`` is about the file."""
    return [
        f"{key} {theirs[key]} instead of {ours[key]}"
        for key in sorted(theirs.keys() & ours.keys())
        if not key.startswith("_") and plain(theirs[key]) != plain(ours[key])
    ]
