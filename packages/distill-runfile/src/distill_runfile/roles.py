"""Resolve the roles of a file: no option is left open. No torch.

``RoleConfig`` (a section of the file) and ``RoleNeed`` (what the method asks) make a ``RoleSpec``
(complete, for the family) within a ``Role`` (with its optimizer); a loaded one is a ``RoleHandle``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import evolve, fields
from distill_protocols import RoleNeed, RoleOptions, RoleSpec
from distill_trainer.attention import FLASH_VERSIONS
from distill_trainer.config import OptimizerConfig, TrainingConfig

from distill_runfile.paths import resolve_path
from distill_runfile.problems import KeyPath
from distill_runfile.schema import Role, RoleConfig, is_local
from distill_runfile.source import Document
from distill_runfile.structure import Structuring, structure, to_plain

OPTIONS = tuple(f.name for f in fields(RoleOptions))
FROM_BASE = RoleOptions.of_weights()
"""Options that say how weights are held: a role beside another's weights has them from there."""


def join_roles(
    document: Document,
    configs: Mapping[str, RoleConfig],
    needs: Mapping[str, RoleNeed],
    training: TrainingConfig | None,
    how: Structuring,
) -> dict[str, Role]:
    """Complete each role from the method's needs, its base, ``training.optimizer`` and
    ``training.attention_backend``.

    A role without a model is left out.

    Args:
        how: takes the problems of optimizers, whose keys are merged here.
    """
    roles = {}
    for name, config in configs.items():
        spec = _role_spec(document, name, configs, needs.get(name))
        if spec is None:
            continue
        if training is not None and config.heads is None and spec.attention_backend is None:
            spec = evolve(spec, attention_backend=_kernel_of_all(training))
        optimizer = None
        if spec.trainable and training is not None:
            merged = {**to_plain(training.optimizer), **config.optimizer}
            optimizer = structure(OptimizerConfig, merged, ("models", name, "optimizer"), how)
        init_from = None
        if config.init_from is not None:
            path = _resolved(document, config.init_from.path, ("models", name, "init_from"))
            init_from = evolve(config.init_from, path=path, role=config.init_from.role or name)
        roles[name] = Role(spec=spec, optimizer=optimizer, init_from=init_from)
    return roles


def _kernel_of_all(training: TrainingConfig) -> str | None:
    """Return the kernel of roles that name none; None: torch's own choice, in any version."""
    kernel = training.attention_backend
    return None if kernel in FLASH_VERSIONS else kernel


def _role_spec(
    document: Document, name: str, configs: Mapping[str, RoleConfig], need: RoleNeed | None
) -> RoleSpec | None:
    config = configs[name]
    options: dict[str, Any] = {option: getattr(config, option) for option in OPTIONS}
    model = name if config.base is None else config.base
    if model in configs:
        options |= {option: getattr(configs[model], option) for option in FROM_BASE}
        options["experts"] = options["experts"] or configs[model].experts
    options["precision"] = options["precision"] or "fp32"
    # A discriminator has no model, and is built for that of another role.
    owner = model if config.heads is None else _model_of(config.heads.on, configs)
    path = configs[owner].path if owner in configs else None
    if path is None:
        return None
    trainable = config.trainable
    if trainable is None:
        # A role that nobody needs has that problem already, and shall have no other.
        trainable = need is None or need.trainable
    return RoleSpec(
        name=name,
        path=_resolved(document, path, ("models", owner, "path")),
        trainable=trainable,
        exits=None if need is None else need.exits,
        target_time=None if need is None else need.target_time,
        **options,
    )


def _model_of(name: str, configs: Mapping[str, RoleConfig]) -> str:
    """Name of the role whose path states what the model of role ``name`` is."""
    config = configs.get(name)
    return name if config is None or config.base is None else config.base


def _resolved(document: Document, path: str, where: KeyPath) -> str:
    """``path`` as an absolute folder, or a hub id; of two parts, a folder beside the file wins."""
    base = document.folder_of(where)
    is_folder = is_local(path) or (base / path).is_dir()
    return resolve_path(path, base) if is_folder else path


def plain_role(family: str, role: Role) -> dict[str, object]:
    """Return a role as a run file could hold it, with nothing left to defaults or to relative
    paths."""
    spec = role.spec
    plain = {
        "family": family,
        "path": spec.path,
        "trainable": spec.trainable,
        "init_from": plain_or_none(role.init_from),
        **{option: plain_or_none(getattr(spec, option)) for option in OPTIONS},
        "optimizer": plain_or_none(role.optimizer) or {},
    }
    left_out = {option for option in ("base", "heads", "experts") if not plain[option]}
    if spec.base is not None:
        left_out |= {"path", *FROM_BASE}
    elif spec.heads is not None:
        left_out |= {"path"}
    return {key: value for key, value in plain.items() if key not in left_out}


def plain_or_none(value: object) -> object:
    """``to_plain`` of a value that may be left out."""
    return None if value is None else to_plain(value)
