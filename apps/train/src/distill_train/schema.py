"""The run file, schema v2. Each section's class lives beside its owner; here they are joined."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from attrs import field, frozen
from distill_checkpoint.config import CheckpointConfig
from distill_conditioning.config import ConditioningConfig, DataConfig
from distill_protocols.plugins import CallbackPlugin, FamilyPlugin, MethodPlugin, RoleSpec
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
class RoleConfig:
    """One role under ``models:``.

    Attributes:
        path: a Diffusers-format folder (begin it with ``./``, ``../`` or ``/``), or a hub id
            ``owner/name``.
        family: only where a file shall say it twice; must equal ``recipe.family``.
        trainable: what the method needs, if left out.
        precision: compute precision of this role's calls.
        optimizer: keys that replace those of ``training.optimizer`` (a schedule as a whole).
    """

    path: str = field()
    family: str | None = None
    trainable: bool | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    optimizer: dict[str, Any] = field(factory=dict)

    @path.validator
    def _check_path(self, attribute: object, value: str) -> None:
        if not is_local(value) and not _HUB_ID.fullmatch(value):
            raise ValueError(
                f"{value!r} is neither a folder (begin it with ./ or ../ or /) nor a hub id "
                "(owner/name); nothing is searched for, so it must be one of them"
            )


def is_local(path: str) -> bool:
    """Whether a role's path is a folder rather than a hub id."""
    return path.startswith(("/", "./", "../", "~"))


@frozen(kw_only=True)
class Role:
    """One role after the check: what to load, and how it is optimized (None: frozen)."""

    spec: RoleSpec
    optimizer: OptimizerConfig | None


@frozen(kw_only=True)
class RunConfig:
    """A run file that was read and found right. Nobody edits it."""

    recipe: RecipeConfig
    roles: Mapping[str, Role]
    training: TrainingConfig
    data: DataConfig
    conditioning: ConditioningConfig
    pipeline: Any
    method: Any
    checkpoint: CheckpointConfig
    validation: ValidationConfig | None
    callbacks: Mapping[str, Any]
    family_plugin: FamilyPlugin
    method_plugin: MethodPlugin
    callback_plugins: Mapping[str, CallbackPlugin]
    resolved: Mapping[str, Any]
    """Every section as plain values, defaults included: what is saved beside the run."""

    @property
    def source(self) -> str:
        """Folder or hub id of VAE, text encoder and tokenizer."""
        return components_source(self.pipeline, self.roles)


def components_source(pipeline: Any, roles: Mapping[str, Role]) -> str:
    """``pipeline_config.components``, or the path of the first role in the file."""
    return pipeline.components or next(iter(roles.values())).spec.path
