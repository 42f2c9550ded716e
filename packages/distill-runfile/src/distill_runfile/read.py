"""From a file to a checked config, or to every problem of the file at once. No torch.

A file is read (``source``), its sections become config objects (``structure``, ``draft``), the
passes of ``checks`` report problems, and what has none becomes a config (``schema``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from attrs import evolve
from distill_checkpoint.config import CheckpointConfig
from distill_conditioning.config import ConditioningConfig, DataConfig
from distill_protocols import ConfigError, FamilyPlugin, MethodPlugin, Problem
from distill_trainer.config import TrainingConfig, ValidationConfig

from distill_runfile.checks import (
    COMPONENTS_CHECKS,
    MODELS_CHECKS,
    RUN_CHECKS,
    SAMPLED_CHECKS,
    Check,
)
from distill_runfile.checks.checkpoints import check_resume
from distill_runfile.checks.data import read_datasets
from distill_runfile.draft import (
    ConfiguredFamily,
    ConfiguredMethod,
    Draft,
    SamplerCompletion,
    Section,
    SectionReader,
    planned_run,
)
from distill_runfile.missing import missing_parts
from distill_runfile.problems import KeyPath, in_order, independent
from distill_runfile.roles import join_roles, plain_or_none, plain_role
from distill_runfile.schema import (
    ComponentsConfig,
    FamilyConfig,
    ModelsConfig,
    RecipeConfig,
    RoleConfig,
    RunConfig,
    SampledConfig,
    SampledSection,
    components_source,
)
from distill_runfile.source import Document, read_document

ConfigT = TypeVar("ConfigT")
SectionT = TypeVar("SectionT", bound=SampledSection)

RUN_SECTIONS = (
    "recipe", "models", "training", "data", "conditioning", "pipeline_config", "method_config",
    "checkpoint", "validation", "callbacks",
)  # fmt: skip
RUN_NEEDED = ("recipe", "models", "training", "data", "pipeline_config")
MODELS_NEEDED = ("recipe", "models", "pipeline_config")


def world_size_of(environment: Mapping[str, str]) -> int:
    """Tell how many processes torchrun started; 1 without it."""
    return int(environment.get("WORLD_SIZE") or 1)


def read_config(
    file: Path,
    models_json: Path | None = None,
    *,
    planning: bool = False,
    world_size: int | None = None,
    made_before: Collection[str] = (),
) -> RunConfig:
    """Read and check a run file.

    Args:
        models_json: a JSON object role -> keys, laid over the file's ``models:`` key by key.
        planning: nothing will be started, so what is not there yet (data, weights that another run
            makes) is no problem, but listed in the config's ``missing``.
        world_size: processes that the run is meant for; None: as torchrun set it, or one.
        made_before: of a plan: starts that a run before this one makes, and so are not missing.

    Raises:
        ConfigError: with every problem that was found, each ``file:line: key: message``.
    """
    reader = _open(file, models_json)
    document = reader.document
    recipe = _required(reader, RecipeConfig, "recipe")
    family, method_plugin = _plugins(reader, recipe)
    role_configs = reader.roles()
    pipeline = _pipeline(reader, family, role_configs)
    training = _section(reader, TrainingConfig, "training", RUN_NEEDED)
    method, readable_method = _method(reader, method_plugin)
    draft = Draft(
        document=document,
        known=RUN_SECTIONS,
        needed=RUN_NEEDED,
        planning=planning,
        world_size=world_size_of(os.environ) if world_size is None else world_size,
        recipe=recipe,
        family=pipeline,
        method=method,
        readable_method=readable_method,
        training=training.value,
        readable_training=training.readable,
        data=_section(reader, DataConfig, "data", RUN_NEEDED).value,
        conditioning=reader.section(ConditioningConfig, "conditioning").value,
        checkpoint=reader.section(CheckpointConfig, "checkpoint").value,
        validation=reader.section(ValidationConfig, "validation", optional=True).value,
        callback_section=reader.callbacks(),
        written_roles=_written_roles(document),
        role_configs=role_configs,
    )
    draft = _joined(reader, draft)
    draft = evolve(draft, datasets=read_datasets(draft))
    draft = evolve(draft, run=planned_run(draft))
    _raise_if_wrong(reader, draft, RUN_CHECKS)
    # Each of them missing is a problem.
    assert recipe is not None
    assert draft.family is not None
    assert draft.method is not None
    assert draft.training is not None
    assert draft.data is not None
    assert draft.conditioning is not None
    assert draft.checkpoint is not None
    callbacks = {name: callback.config for name, callback in draft.callbacks.items()}
    resolved = _resolved(recipe, draft)
    # Only now: what a checkpoint is compared with is all of a file without problems.
    _raise_if_wrong(reader, draft, (lambda draft: check_resume(draft, resolved),))
    return RunConfig(
        recipe=recipe,
        roles=draft.roles,
        pipeline=draft.family.config,
        method=draft.method.config,
        family_plugin=draft.family.plugin,
        method_plugin=draft.method.plugin,
        training=draft.training,
        data=draft.data,
        conditioning=draft.conditioning,
        checkpoint=draft.checkpoint,
        validation=draft.validation,
        callbacks=callbacks,
        callback_plugins={name: callback.plugin for name, callback in draft.callbacks.items()},
        callbacks_off=draft.callback_section.off,
        resolved=resolved,
        missing=tuple(missing_parts(draft, made_before=made_before)) if planning else (),
        notes=_notes(draft),
    )


def read_models(file: Path, role: str) -> ModelsConfig:
    """Read the models of ``file``, a run file or a checkpoint's ``config.json``.

    Raises:
        ConfigError: with every problem of those sections, of other roles than ``role`` excepted:
            their folders may be gone.
    """
    reader = _open(file)
    recipe = _required(reader, RecipeConfig, "recipe")
    family, method_plugin = _plugins(reader, recipe)
    # A run that is over needs no optimizers, nor the weights that trained roles began with.
    role_configs = {name: evolve(config, optimizer={}) for name, config in reader.roles().items()}
    pipeline = _pipeline(reader, family, role_configs)
    method, readable_method = _method(reader, method_plugin)
    draft = Draft(
        document=reader.document,
        known=RUN_SECTIONS,
        needed=MODELS_NEEDED,
        recipe=recipe,
        family=pipeline,
        method=method,
        readable_method=readable_method,
        written_roles=_written_roles(reader.document),
        role_configs=role_configs,
    )
    draft = _joined(reader, draft)
    roles = {
        name: evolve(role, init_from=None) if role.spec.trainable else role
        for name, role in draft.roles.items()
    }
    draft = evolve(draft, roles=roles)
    for section in MODELS_NEEDED:
        if reader.document.values.get(section) is None:
            reader.report((section,), "missing section; it describes how the weights are used")
    _raise_if_wrong(
        reader,
        draft,
        MODELS_CHECKS,
        only=lambda p: p.path[:1] != ("models",) or p.path[1:2] in ((), (role,)),
    )
    assert recipe is not None
    assert draft.family is not None
    assert draft.method is not None
    return ModelsConfig(
        recipe=recipe,
        roles=draft.roles,
        pipeline=draft.family.config,
        method=draft.method.config,
        family_plugin=draft.family.plugin,
        method_plugin=draft.method.plugin,
    )


def read_sampled(
    file: Path,
    section: str,
    config_class: type[SectionT],
    rules: Callable[[SampledConfig[SectionT]], Iterable[Problem]] = lambda config: (),
    *,
    planning: bool = False,
) -> SampledConfig[SectionT]:
    """Read and check another app's file: one frozen role, a data set, and a section of its own.

    Args:
        section: the app's own.
        rules: what else is wrong, across sections, once each is right by itself; paths begin at
            the top of the file.
        planning: as in ``read_config``.

    Raises:
        ConfigError: as ``read_config``.
    """
    needed = ("recipe", "models", "data", "pipeline_config", section)
    reader = _open(file)
    recipe = _required(reader, FamilyConfig, "recipe")
    family = _family(reader, recipe)
    written = reader.roles()
    pipeline = _pipeline(reader, family, written)
    own = _section(reader, config_class, section, needed).value
    draft = Draft(
        document=reader.document,
        known=(*needed, "conditioning"),
        needed=needed,
        planning=planning,
        recipe=recipe,
        family=pipeline,
        data=_section(reader, DataConfig, "data", needed).value,
        conditioning=reader.section(ConditioningConfig, "conditioning").value,
        written_roles=_written_roles(reader.document),
        role_configs=written,
        sampled=None if own is None else (section, own),
    )
    draft = _joined(reader, draft)
    frozen = {
        name: evolve(role, spec=evolve(role.spec, trainable=False))
        for name, role in draft.roles.items()
    }
    draft = evolve(draft, roles=frozen)
    draft = evolve(draft, datasets=read_datasets(draft))
    draft = evolve(draft, run=planned_run(draft))
    _raise_if_wrong(reader, draft, SAMPLED_CHECKS)
    assert recipe is not None
    assert draft.family is not None
    assert draft.data is not None
    assert draft.conditioning is not None
    assert own is not None
    [role] = draft.roles.values()
    config = SampledConfig(
        recipe=recipe,
        role=role,
        pipeline=draft.family.config,
        data=draft.data,
        conditioning=draft.conditioning,
        family_plugin=draft.family.plugin,
        section=own,
        missing=tuple(missing_parts(draft)) if planning else (),
        notes=_notes(draft),
    )
    _raise_if_wrong(reader, draft, (lambda _: rules(config),))
    return config


def read_components(
    file: Path,
    section: str,
    config_class: type[ConfigT],
    rules: Callable[[ComponentsConfig[ConfigT]], Iterable[Problem]] = lambda config: (),
    *,
    base_key: str,
) -> ComponentsConfig[ConfigT]:
    """Read and check the file of an app that calls VAE and encoders, and has a section of its own.

    Args:
        section: the app's own.
        rules: what else is wrong, across sections, once each is right by itself; paths begin at
            the top of the file.
        base_key: key of ``section`` that may name a run file, whose recipe, models, conditioning
            and ``pipeline_config`` are those of this file where it has none.

    Raises:
        ConfigError: as ``read_config``.
    """
    needed = (*MODELS_NEEDED, section)
    reader = _open(file, base=((section, base_key), (*MODELS_NEEDED, "conditioning")))
    written = reader.document.values.get("recipe")
    kind = RecipeConfig if isinstance(written, dict) and "method" in written else FamilyConfig
    recipe = _required(reader, kind, "recipe")
    family = _family(reader, recipe)
    # Nothing is trained, and data do not depend on what a role starts with.
    configs = {
        name: evolve(config, optimizer={}, init_from=None)
        for name, config in reader.roles().items()
    }
    pipeline = _pipeline(reader, family, configs)
    own = _section(reader, config_class, section, needed).value
    draft = Draft(
        document=reader.document,
        known=(*needed, "conditioning"),
        needed=needed,
        recipe=recipe,
        family=pipeline,
        conditioning=reader.section(ConditioningConfig, "conditioning").value,
        written_roles=_written_roles(reader.document),
        role_configs=configs,
    )
    draft = _joined(reader, draft)
    frozen = {
        name: evolve(role, spec=evolve(role.spec, trainable=False))
        for name, role in draft.roles.items()
    }
    draft = evolve(draft, roles=frozen)
    if not draft.written_roles and "models" in reader.document.values:
        reader.report(("models",), "names no role; write one, with the path of its model")
    _raise_if_wrong(reader, draft, COMPONENTS_CHECKS)
    assert recipe is not None
    assert draft.family is not None
    assert draft.conditioning is not None
    assert own is not None
    config = ComponentsConfig(
        recipe=recipe,
        roles=draft.roles,
        pipeline=draft.family.config,
        conditioning=draft.conditioning,
        family_plugin=draft.family.plugin,
        section=own,
    )
    _raise_if_wrong(reader, draft, (lambda _: rules(config),))
    return config


# -- drafting -------------------------------------------------------------------------------------


def _open(
    file: Path,
    models_json: Path | None = None,
    *,
    base: tuple[KeyPath, Sequence[str]] | None = None,
) -> SectionReader:
    document = read_document(file, models_json, base=base)
    if document.main.values is None or (document.over and document.over.values is None):
        raise ConfigError([str(problem) for problem in document.problems])
    return SectionReader(document=document)


def _written_roles(document: Document) -> frozenset[str]:
    section = document.values.get("models")
    return frozenset(section) if isinstance(section, dict) else frozenset()


def _section(
    reader: SectionReader, kind: type[ConfigT], name: str, needed: tuple[str, ...]
) -> Section[ConfigT]:
    """Read a section; one that must be there, and is not, is not made of defaults."""
    return reader.section(kind, name, optional=name in needed)


def _required(reader: SectionReader, kind: type[ConfigT], name: str) -> ConfigT | None:
    return reader.section(kind, name, optional=True).value


def _family(reader: SectionReader, recipe: FamilyConfig | None) -> FamilyPlugin[Any] | None:
    if recipe is None:
        return None
    return reader.plugin("distill.families", recipe.family, ("recipe", "family"))


def _plugins(
    reader: SectionReader, recipe: RecipeConfig | None
) -> tuple[FamilyPlugin[Any] | None, MethodPlugin[Any] | None]:
    if recipe is None:
        return None, None
    path = ("recipe", "method")
    return _family(reader, recipe), reader.plugin("distill.methods", recipe.method, path)


def _pipeline(
    reader: SectionReader,
    family: FamilyPlugin[Any] | None,
    role_configs: Mapping[str, RoleConfig],
) -> ConfiguredFamily | None:
    """Read ``pipeline_config``, and let samplers ask for the number of tokens from here on."""
    if family is None:
        return None
    config = _required(reader, family.config_class, "pipeline_config")
    if config is None:
        return None

    def count_tokens() -> int | None:
        roles = join_roles(reader.document, role_configs, {}, None, reader.structuring)
        if not roles:
            return 0  # no role can be read, which is a problem of its own
        return family.latent_tokens(config, source=components_source(family, config, roles))

    solvers = family.capabilities(config).solvers
    reader.complete = SamplerCompletion(family.name, count_tokens, solvers)
    return ConfiguredFamily(plugin=family, config=config)


def _method(
    reader: SectionReader, plugin: MethodPlugin[Any] | None
) -> tuple[ConfiguredMethod | None, ConfiguredMethod | None]:
    """Read ``method_config``: (as it is, with its wrong keys left out)."""
    if plugin is None:
        return None, None
    section = reader.section(plugin.config_class, "method_config")
    right, readable = (
        None if config is None else ConfiguredMethod(plugin=plugin, config=config)
        for config in (section.value, section.readable)
    )
    return right, readable


def _joined(reader: SectionReader, draft: Draft) -> Draft:
    roles = join_roles(
        draft.document, draft.role_configs, draft.needs, draft.training, reader.structuring
    )
    return evolve(draft, roles=roles)


def _raise_if_wrong(
    reader: SectionReader,
    draft: Draft,
    checks: Iterable[Check],
    only: Callable[[Problem], bool] = lambda problem: True,
) -> None:
    """Apply ``checks`` and raise with all problems, those of reading included.

    Args:
        only: which of the problems count.
    """
    document = reader.document
    problems = [*reader.problems, *(problem for check in checks for problem in check(draft))]
    located = [
        document.locate(problem.path, problem.message)
        for problem in independent(problems)
        if only(problem)
    ]
    located = [problem for problem in located if not document.is_unreadable(problem)]
    if located or document.problems:
        ordered = in_order([*document.problems, *located], document.main.file)
        raise ConfigError([str(problem) for problem in ordered])


def _notes(draft: Draft) -> tuple[str, ...]:
    of_data = () if draft.datasets is None else draft.datasets.notes
    return (*draft.callback_section.notes, *of_data)


def _resolved(recipe: RecipeConfig, draft: Draft) -> dict[str, object]:
    """Return every section as plain values; checkpoints hold it as ``config.json``."""
    assert draft.family is not None
    assert draft.method is not None
    sections: dict[str, object] = {
        "recipe": recipe,
        "models": {name: plain_role(recipe.family, role) for name, role in draft.roles.items()},
        "training": draft.training,
        "data": draft.data,
        "conditioning": draft.conditioning,
        "checkpoint": draft.checkpoint,
        "validation": draft.validation,
        "pipeline_config": draft.family.config,
        "method_config": draft.method.config,
        "callbacks": {
            **{name: callback.config for name, callback in draft.callbacks.items()},
            **dict.fromkeys(draft.callback_section.off),
        },
    }
    return {name: plain_or_none(value) for name, value in sections.items()}
