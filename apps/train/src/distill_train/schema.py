"""The run file, schema v2. Each section's class lives beside its owner; here they are joined."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen
from distill_checkpoint import CheckpointConfig, checkpoints
from distill_conditioning.config import ConditioningConfig, DataConfig
from distill_protocols import (
    CallbackPlugin,
    CompileSpec,
    DiscriminatorSpec,
    FamilyPlugin,
    FsdpPolicy,
    LoraSpec,
    MethodPlugin,
    RoleSpec,
)
from distill_trainer.config import OptimizerConfig, TrainingConfig, ValidationConfig

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@frozen(kw_only=True)
class RecipeConfig:
    """What is combined.

    Attributes:
        family: model family, from the installed ``distill.families``.
        method: algorithm, from the installed ``distill.methods``.
    """

    family: str
    method: str


@frozen(kw_only=True)
class FamilyConfig:
    """``recipe`` of a file that trains nothing.

    Attributes:
        family: model family, from the installed ``distill.families``.
    """

    family: str


@frozen(kw_only=True)
class InitFromConfig:
    """Weights that a role starts with, instead of those of its ``path``.

    Attributes:
        path: a checkpoint folder of another run (``.../checkpoint-000400``), an exported or any
            other Diffusers-format folder, or a hub id.
        role: which role of a checkpoint; left out, the one of the same name.
        ema: a checkpoint's averaged weights instead of its live ones.
    """

    path: str = field()
    role: str | None = None
    ema: bool = False

    @path.validator
    def _check_path(self, attribute: object, value: str) -> None:
        _folder_or_hub_id(value)


def _folder_or_hub_id(value: str) -> None:
    if not is_local(value) and not _HUB_ID.fullmatch(value):
        raise ValueError(
            f"{value!r} is neither a folder (begin it with ./ or ../ or /) nor a hub id "
            "(owner/name); nothing is searched for, so it must be one of them"
        )


@frozen(kw_only=True)
class RoleConfig:
    """One role under ``models:``.

    Attributes:
        path: a Diffusers-format folder (begin it with ``./``, ``../`` or ``/``), or a hub id
            ``owner/name``: how the model is built, and its weights. Left out beside ``base`` and
            ``heads``.
        base: train ``lora`` beside the weights of this frozen role, which are held once.
        init_from: start with other weights than those of ``path``.
        lora: train low-rank adapters beside the role's weights, which stay as they are.
        heads: it is a discriminator: small networks on the features of another role's blocks.
        family: only where a file shall say it twice; must equal ``recipe.family``.
        trainable: what the method needs, if left out.
        precision: compute precision of this role's calls (of a role with ``base``: the base's).
        fsdp: how it is spread over processes.
        activation_checkpointing: keep only the inputs of its blocks for the backward pass, which
            computes the rest again.
        compile: ``torch.compile`` its blocks; ``{}`` as torch does it by itself.
        offload: its weights wait in host memory while other roles are called; frozen roles only.
        optimizer: keys that replace those of ``training.optimizer`` (a schedule as a whole).
    """

    path: str | None = field(default=None)
    base: str | None = None
    family: str | None = None
    trainable: bool | None = None
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    init_from: InitFromConfig | None = None
    lora: LoraSpec | None = None
    heads: DiscriminatorSpec | None = None
    fsdp: FsdpPolicy | None = None
    activation_checkpointing: bool = False
    compile: CompileSpec | None = None
    offload: bool = False
    optimizer: dict[str, Any] = field(factory=dict)

    @path.validator
    def _check_path(self, attribute: object, value: str | None) -> None:
        if value is not None:
            _folder_or_hub_id(value)


def is_local(path: str) -> bool:
    """Whether a role's path is a folder rather than a hub id."""
    return path.startswith(("/", "./", "../", "~"))


@frozen(kw_only=True)
class Role:
    """One role after the check: what to load, and how it is optimized (None: frozen)."""

    spec: RoleSpec
    optimizer: OptimizerConfig | None
    init_from: InitFromConfig | None = None

    def comes_from_checkpoint(self, checkpoint: CheckpointConfig, output_dir: Path) -> bool:
        """Whether a run that goes on finds all of this role's weights in its own checkpoint.

        Not a frozen role's, nor the base of a LoRA, which no checkpoint holds; and not those of
        a role that ``changes`` adds, which starts as in a fresh run.
        """
        if f"roles.{self.spec.name}" in checkpoint.changes.added:
            return False
        goes_on = checkpoint.resume not in ("none", "latest") or (
            checkpoint.resume == "latest" and bool(checkpoints(output_dir))
        )
        return goes_on and self.spec.trainable and self.spec.lora is None


@frozen(kw_only=True)
class ModelsConfig:
    """What a run file says of its models: all that an export needs to know of a run."""

    recipe: RecipeConfig
    roles: Mapping[str, Role]
    pipeline: Any
    method: Any
    family_plugin: FamilyPlugin
    method_plugin: MethodPlugin

    @property
    def source(self) -> str:
        """Folder or hub id of VAE, text encoder and tokenizer."""
        return components_source(self.family_plugin, self.pipeline, self.roles)


@frozen(kw_only=True)
class SampledConfig:
    """One role that is sampled on the conditions of a data set; nothing learns."""

    recipe: FamilyConfig
    role: Role
    pipeline: Any
    data: DataConfig
    conditioning: ConditioningConfig
    family_plugin: FamilyPlugin
    section: Any
    """That of the app which samples it; its ``sampler`` is how."""

    @property
    def source(self) -> str:
        """Folder or hub id of VAE, text encoder and tokenizer."""
        return components_source(
            self.family_plugin, self.pipeline, {self.role.spec.name: self.role}
        )


@frozen(kw_only=True)
class RunConfig(ModelsConfig):
    """A run file that was read and found right. Nobody edits it."""

    training: TrainingConfig
    data: DataConfig
    conditioning: ConditioningConfig
    checkpoint: CheckpointConfig
    validation: ValidationConfig | None
    callbacks: Mapping[str, Any]
    callback_plugins: Mapping[str, CallbackPlugin]
    resolved: Mapping[str, Any]
    """Every section as plain values, defaults included: what is saved beside the run."""


def components_source(family: FamilyPlugin[Any], pipeline: Any, roles: Mapping[str, Role]) -> str:
    """Where the family says that VAE and encoders come from, or the path of the first role."""
    return family.components(pipeline) or next(iter(roles.values())).spec.path
