"""The sections of a run file, schema v2. Each section's class is beside its owner; here are those
that belong to the file itself, and the configs of whole files that have no problem. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from attrs import field, frozen
from distill_checkpoint import CheckpointConfig, list_checkpoints
from distill_conditioning.config import ConditioningConfig, DataConfig
from distill_protocols import (
    CallbackPlugin,
    FamilyPlugin,
    MethodConfig,
    MethodPlugin,
    RoleOptions,
    RoleSpec,
    SamplerSpec,
)
from distill_trainer.config import OptimizerConfig, TrainingConfig, ValidationConfig

from distill_runfile.paths import written_path_problem

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@frozen(kw_only=True)
class FamilyConfig:
    """``recipe`` of a file that trains nothing.

    Attributes:
        family: model family, from the installed ``distill.families``.
    """

    family: str


@frozen(kw_only=True)
class RecipeConfig(FamilyConfig):
    """What is combined.

    Attributes:
        family: model family, from the installed ``distill.families``.
        method: algorithm, from the installed ``distill.methods``.
    """

    method: str


def _folder_or_hub_id(_config: object, _attribute: object, value: str | None) -> None:
    if value is not None and (problem := written_path_problem(value)):
        raise ValueError(problem)
    if value is not None and not is_local(value) and not _HUB_ID.fullmatch(value):
        raise ValueError(
            f"{value!r} is neither a folder (begin it with ./ or ../ or /) nor a hub id "
            "(owner/name); nothing is searched for, so it must be one of them"
        )


@frozen(kw_only=True)
class InitFromConfig:
    """Weights that a role starts with, instead of those of its ``path``.

    Attributes:
        path: a checkpoint folder of another run (``.../checkpoint-000400``); an exported or any
            other Diffusers-format folder, or a hub id; or what the family reads beside these: a
            safetensors file or folder of the model's original code (ComfyUI's prefixes are
            known), or a LoRA, which is merged into the weights of ``path``, or is the start of a
            role with the same ``lora``.
        role: which role of a checkpoint; left out, the one of the same name.
        ema: a checkpoint's averaged weights instead of its live ones.
    """

    path: str = field(validator=_folder_or_hub_id)
    role: str | None = None
    ema: bool = False


@frozen(kw_only=True)
class RoleConfig(RoleOptions):
    """One role under ``models:``: the options of every role, and where it comes from.

    Attributes:
        path: a Diffusers-format folder (begin it with ``./``, ``../`` or ``/``), or a hub id
            ``owner/name``: how the model is built, and its weights. Left out beside ``base`` and
            ``heads``.
        init_from: start with other weights than those of ``path``.
        family: may repeat it; must equal ``recipe.family``.
        trainable: what the method needs, if left out.
        optimizer: keys that replace those of ``training.optimizer`` (a schedule as a whole).
    """

    path: str | None = field(default=None, validator=_folder_or_hub_id)
    family: str | None = None
    trainable: bool | None = None
    init_from: InitFromConfig | None = None
    optimizer: dict[str, Any] = field(factory=dict)


def is_local(path: str) -> bool:
    """Return whether a role's path is a folder rather than a hub id."""
    return path.startswith(("/", "./", "../", "~"))


@frozen(kw_only=True)
class Role:
    """One role after the check: what to load, and how it is optimized (None: frozen)."""

    spec: RoleSpec
    optimizer: OptimizerConfig | None
    init_from: InitFromConfig | None = None

    def comes_from_checkpoint(self, checkpoint: CheckpointConfig, output_dir: Path) -> bool:
        """Return whether a run that goes on finds all of this role's weights in its own checkpoint.

        Not a frozen role's, nor the base of a LoRA, which no checkpoint holds; and not those of
        a role that ``changes`` adds, which starts as in a fresh run.
        """
        if f"roles.{self.spec.name}" in checkpoint.changes.added:
            return False
        resumes = checkpoint.resume not in ("none", "latest") or (
            checkpoint.resume == "latest" and bool(list_checkpoints(output_dir))
        )
        return resumes and self.spec.trainable and self.spec.lora is None


@frozen(kw_only=True)
class ModelsConfig:
    """The models of a run file: all that an export needs to know of a run.

    Attributes:
        pipeline: of the family's own ``config_class``.
    """

    recipe: RecipeConfig
    roles: Mapping[str, Role]
    pipeline: object
    method: MethodConfig
    family_plugin: FamilyPlugin[Any]
    method_plugin: MethodPlugin[Any]

    @property
    def source(self) -> str:
        """Folder or hub id of VAE, text encoder and tokenizer."""
        return components_source(self.family_plugin, self.pipeline, self.roles)

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """(C, T, H, W) of each size of the run's clips, the largest first; those that are known
        without weights."""
        # What is asked of the whole section is of the largest clip.
        configs = (self.pipeline, *clip_configs(self.family_plugin, self.pipeline))
        shapes = (self.family_plugin.latent_shape(one, source=self.source) for one in configs)
        return tuple(dict.fromkeys(shape for shape in shapes if shape is not None))


class SampledSection(Protocol):
    """What the section of an app that samples a role has."""

    @property
    def sampler(self) -> SamplerSpec: ...


SectionT = TypeVar("SectionT", bound=SampledSection)


@frozen(kw_only=True)
class SampledConfig(Generic[SectionT]):
    """One role that is sampled on the conditions of a data set; nothing is trained.

    Attributes:
        pipeline: of the family's own ``config_class``.
        section: that of the app which samples the role.
        missing: what is not on this machine yet; empty unless the file was read for a plan.
        notes: as of ``RunConfig``.
    """

    recipe: FamilyConfig
    role: Role
    pipeline: object
    data: DataConfig
    conditioning: ConditioningConfig
    family_plugin: FamilyPlugin[Any]
    section: SectionT
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """Folder or hub id of VAE, text encoder and tokenizer."""
        return components_source(
            self.family_plugin, self.pipeline, {self.role.spec.name: self.role}
        )


ComponentsSectionT = TypeVar("ComponentsSectionT")


@frozen(kw_only=True)
class ComponentsConfig(Generic[ComponentsSectionT]):
    """What an app needs that calls VAE and encoders alone; no model is loaded.

    Attributes:
        roles: that the data are made for.
        pipeline: of the family's own ``config_class``.
        section: the app's own.
    """

    recipe: FamilyConfig
    roles: Mapping[str, Role]
    pipeline: object
    conditioning: ConditioningConfig
    family_plugin: FamilyPlugin[Any]
    section: ComponentsSectionT

    @property
    def source(self) -> str:
        """Folder or hub id of VAE, text encoder and tokenizer."""
        return components_source(self.family_plugin, self.pipeline, self.roles)


@frozen(kw_only=True)
class RunConfig(ModelsConfig):
    """A run file that was read and has no problem. Nobody edits it.

    Attributes:
        callbacks: by name, of the plugin's own ``config_class``.
        callbacks_off: names of those that are on by default and that the file turns off.
        resolved: every section as plain values, defaults included: what is saved beside the run.
        missing: what is not on this machine yet; empty unless the file was read for a plan.
        notes: what is no problem and is to be logged once; a line each.
    """

    training: TrainingConfig
    data: DataConfig
    conditioning: ConditioningConfig
    checkpoint: CheckpointConfig
    validation: ValidationConfig | None
    callbacks: Mapping[str, object]
    callback_plugins: Mapping[str, CallbackPlugin[Any]]
    resolved: Mapping[str, object]
    callbacks_off: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def guides_by_two_calls(self) -> bool:
        """Whether the method guides a model, and each guided call is one of two conditions."""
        embeds_guidance = self.family_plugin.capabilities(self.pipeline).embeds_guidance
        return self.method.needs_negative and not embeds_guidance


def components_source(
    family: FamilyPlugin[Any], pipeline: object, roles: Mapping[str, Role]
) -> str:
    """Where VAE and encoders come from: as the family decides, or the path of the first role."""
    return family.components(pipeline) or next(iter(roles.values())).spec.path


def clip_configs(family: FamilyPlugin[Any], pipeline: object) -> tuple[object, ...]:
    """Return ``pipeline_config`` as that of each size of the run's clips."""
    clips = family.clip_shapes(pipeline)
    return tuple(family.config_of_clip(pipeline, clip) for clip in clips) or (pipeline,)
