"""The family as the app sees it before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from distill_protocols import Capabilities, FamilyPlugin, RoleSpec, WeightsError

from distill_adapters_wan.capabilities import CAPABILITIES
from distill_adapters_wan.config import WanPipelineConfig
from distill_adapters_wan.folders import (
    DIFFUSERS_STEM,
    component_faults,
    folder_fault,
    folder_hint,
    is_hub_id,
    locate,
    module_faults,
    pipeline_faults,
    read_json,
)
from distill_adapters_wan.published import PUBLISHED, LatentFacts
from distill_adapters_wan.shape import clip_faults, latent_facts, latent_shape, unsupported

if TYPE_CHECKING:
    import torch
    from distill_protocols import DistillAdapter, Exporter, ModelBundle, RolePlan


class WanFamily(FamilyPlugin):
    """Wan 2.1 text-to-video on diffusers' own modules."""

    name: ClassVar[str] = "wan"
    help: ClassVar[str] = "Wan 2.1 text-to-video, from Diffusers-format folders or hub ids"
    config_class: ClassVar[type] = WanPipelineConfig

    def capabilities(self, config: WanPipelineConfig) -> Capabilities:
        return CAPABILITIES

    def faults(self, role: RoleSpec, config: WanPipelineConfig) -> Sequence[str]:
        """What is missing or damaged, and where clip and model do not fit. Reads no weights.

        A hub id that is not in the local cache is no fault if its numbers are published: the run
        can be planned, and ``load`` says what to download.
        """
        missing = list(_presence_faults(role.path, config))
        return missing or list(_fit_faults(role.path, config))

    def latent_shape(
        self, config: WanPipelineConfig, *, source: str
    ) -> tuple[int, int, int, int] | None:
        """(C, T, H, W) from the numbers of ``source``'s VAE; None where they are not known."""
        facts = _latents(source)
        return facts and latent_shape(config, facts)

    def text_shape(self, config: WanPipelineConfig, *, source: str) -> tuple[int, int] | None:
        """(max_sequence_length, the transformer's text_dim); None where no number is known."""
        try:
            transformers, _ = _architecture(source)
        except WeightsError:
            return None
        return config.max_sequence_length, transformers["transformer"].get("text_dim", 4096)

    def plan(self, role: RoleSpec, config: WanPipelineConfig) -> RolePlan:
        """Modules and sizes, from the meta device.

        Raises:
            WeightsError: nothing says how the model is built.
        """
        from distill_protocols import RolePlan

        from distill_adapters_wan.planning import plan_modules

        transformers, _ = _architecture(role.path)
        folder = locate(role.path)
        return RolePlan(
            role=role.name,
            source=role.path,
            modules=plan_modules(transformers),
            present=folder is not None and not _weight_faults(folder, transformers),
        )

    def load(
        self, roles: Sequence[RoleSpec], config: WanPipelineConfig, *, device: torch.device
    ) -> ModelBundle:
        from distill_adapters_wan.loading import load_bundle

        return load_bundle(roles, device=device)

    def adapter(
        self, bundle: ModelBundle, config: WanPipelineConfig, *, source: str
    ) -> DistillAdapter:
        from distill_adapters_wan.adapter import WanAdapter

        return WanAdapter(bundle, config, source=source)

    def exporter(self, bundle: ModelBundle, config: WanPipelineConfig, *, source: str) -> Exporter:
        from distill_adapters_wan.export import WanExporter

        return WanExporter(bundle, config, source=source)


PLUGIN = WanFamily()


def _presence_faults(path: str, config: WanPipelineConfig) -> Iterator[str]:
    for place in filter(None, (path, config.components)):
        fault = folder_fault(place)
        if is_hub_id(place) and place not in PUBLISHED and locate(place) is None:
            fault = _unknown_hub_id(place)
        if fault:
            yield fault if place == path else f"pipeline_config.components: {fault}"
    folder = locate(path)
    if folder is not None and not is_hub_id(path):
        yield from pipeline_faults(folder, components=config.components is None)
    components = config.components and locate(config.components)
    if components and not is_hub_id(str(config.components)):
        yield from component_faults(components)


def _unknown_hub_id(path: str) -> str:
    diffusers_id = f"{path}-Diffusers"
    if diffusers_id in PUBLISHED:
        return f"{path} holds Wan's original format; did you mean {diffusers_id}?"
    return (
        f"{path} is not in the local Hugging Face cache, and its architecture is not among those "
        f"that ship with this package ({', '.join(PUBLISHED)}), so nothing can be planned. "
        f"Download it first: hf download {path}{folder_hint(path)}"
    )


def _fit_faults(path: str, config: WanPipelineConfig) -> Iterator[str]:
    try:
        transformers, expand = _architecture(path)
        variants = list(unsupported(transformers, expand))
        if variants:
            yield from (f"{path}: {reason}" for reason in variants)
            return
        facts = _latents(config.components or path)
        if facts is not None:
            yield from clip_faults(config, facts, transformers["transformer"])
    except WeightsError as error:
        yield str(error)


def _architecture(path: str) -> tuple[Mapping[str, Mapping[str, Any]], bool]:
    """Transformer configurations by module name, and whether timesteps are a token's own."""
    folder = locate(path)
    if folder is not None and (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        names = [n for n in ("transformer", "transformer_2") if (index.get(n) or [None])[0]]
        if all((folder / name / "config.json").is_file() for name in names):
            configs = {name: read_json(folder / name / "config.json") for name in names}
            return configs, bool(index.get("expand_timesteps"))
    if path in PUBLISHED:
        return PUBLISHED[path].transformers, PUBLISHED[path].expand_timesteps
    raise WeightsError(
        folder_fault(path)
        or (_unknown_hub_id(path) if is_hub_id(path) else f"{path} has no transformer/config.json")
    )


def _latents(source: str) -> LatentFacts | None:
    folder = locate(source)
    if folder is not None and (folder / "vae" / "config.json").is_file():
        return latent_facts(folder / "vae")
    return PUBLISHED[source].latents if source in PUBLISHED else None


def _weight_faults(folder: Path, transformers: Mapping[str, Any]) -> list[str]:
    return [f for name in transformers for f in module_faults(folder / name, DIFFUSERS_STEM)]
