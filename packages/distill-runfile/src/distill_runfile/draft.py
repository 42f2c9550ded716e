"""A run file on its way to a config: its sections, as far as they could be read. No torch.

Every part is optional: a pass of ``checks`` reads those that it needs, and reports nothing where
one of them is missing, as that has a problem of its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, TypeVar

import attrs
from attrs import define, field, frozen
from distill_checkpoint.config import CheckpointConfig
from distill_conditioning import DataInfo
from distill_conditioning.config import ConditioningConfig, DataConfig
from distill_protocols import (
    CallbackPlugin,
    Capabilities,
    Chunk,
    DynamicShift,
    FamilyPlugin,
    MethodConfig,
    MethodPlugin,
    PlannedRun,
    PluginError,
    Problem,
    RoleNeed,
    SamplerSpec,
    Solver,
)
from distill_protocols.plugins import Group
from distill_runtime import load_plugin, plugin_names
from distill_trainer.config import TrainingConfig, ValidationConfig

from distill_runfile.problems import KeyPath
from distill_runfile.schema import (
    FamilyConfig,
    Role,
    RoleConfig,
    SampledSection,
    clip_configs,
    components_source,
)
from distill_runfile.source import Document
from distill_runfile.structure import Structuring, structure

ConfigT = TypeVar("ConfigT")


@frozen(kw_only=True)
class ConfiguredFamily:
    """A family, and ``pipeline_config`` as its config class."""

    plugin: FamilyPlugin[Any]
    config: object


@frozen(kw_only=True)
class ConfiguredMethod:
    """A method, and ``method_config`` as its config class."""

    plugin: MethodPlugin[Any]
    config: MethodConfig


@frozen(kw_only=True)
class ConfiguredCallback:
    """A callback, and its section as its config class; None: something in it is wrong."""

    plugin: CallbackPlugin[Any]
    config: object | None


@frozen(kw_only=True)
class CallbackSection:
    """The callbacks of a run.

    Attributes:
        callbacks: by name: those that the file names, then those that are on by default. Left out
            are those that are not installed.
        off: names of those that are on by default and that the file turns off.
        notes: what is no problem of the file and is to be logged once; a line each.
    """

    callbacks: Mapping[str, ConfiguredCallback] = field(factory=dict)
    off: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@frozen(kw_only=True)
class Section(Generic[ConfigT]):
    """A section as it could be read.

    Attributes:
        value: None: it is missing, or something in it is wrong.
        readable: the same with its wrong keys left out, so that rules which need the others can
            still be applied; None: there is nothing to read.
    """

    value: ConfigT | None = None
    readable: ConfigT | None = None


@frozen(kw_only=True)
class Draft:
    """A run file, as far as it could be read.

    Attributes:
        known: names of the sections that this kind of file may have.
        needed: names of those that it must have.
        planning: nothing will be started, so that data may be missing.
        world_size: processes that the run is meant for.
        written_roles: names under ``models:``, whatever is wrong with them.
        role_configs: those that could be read.
        roles: those of which the model is known, with nothing left open.
        datasets: None: nothing is known of them.
        run: the run as methods and callbacks see it.
        sampled: name and value of the section of an app that samples one role.
    """

    document: Document
    known: tuple[str, ...]
    needed: tuple[str, ...]
    planning: bool = False
    world_size: int = 1
    recipe: FamilyConfig | None = None
    family: ConfiguredFamily | None = None
    method: ConfiguredMethod | None = None
    readable_method: ConfiguredMethod | None = None
    training: TrainingConfig | None = None
    readable_training: TrainingConfig | None = None
    data: DataConfig | None = None
    conditioning: ConditioningConfig | None = None
    checkpoint: CheckpointConfig | None = None
    validation: ValidationConfig | None = None
    callback_section: CallbackSection = field(factory=CallbackSection)
    written_roles: frozenset[str] = frozenset()
    role_configs: Mapping[str, RoleConfig] = field(factory=dict)
    roles: Mapping[str, Role] = field(factory=dict)
    datasets: DataInfo | None = None
    run: PlannedRun = field(factory=lambda: PlannedRun(roles={}))
    sampled: tuple[str, SampledSection] | None = None

    @property
    def callbacks(self) -> Mapping[str, ConfiguredCallback]:
        """The callbacks of the run, by name."""
        return self.callback_section.callbacks

    @property
    def needs(self) -> dict[str, RoleNeed]:
        """By name, the roles that the method calls; empty where that is not known."""
        method = self.readable_method
        return {} if method is None else {need.name: need for need in method.config.roles}

    @property
    def has_negative(self) -> bool | None:
        """Whether there will be a negative condition; None: it is not known yet."""
        if self.conditioning is None or self.conditioning.negative_prompt is not None:
            return True
        return None if self.datasets is None else bool(self.datasets.negative_prompts)

    @property
    def capabilities(self) -> Capabilities:
        """What the family can do; nothing where it is not known."""
        if self.family is None:
            return Capabilities()
        return self.family.plugin.capabilities(self.family.config)


@define
class SectionReader:
    """Reads the sections of one document, and collects what is wrong with them.

    Attributes:
        complete: as in ``Structuring``. Until family and roles are known, and where they are
            wrong, clips are taken to have no tokens, so that rules can be applied at all.
    """

    document: Document
    problems: list[Problem] = field(factory=list)
    complete: SamplerCompletion = field(
        factory=lambda: SamplerCompletion(family="", count_tokens=lambda: 0)
    )

    def report(self, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(path, message))

    @property
    def structuring(self) -> Structuring:
        """How values of this document are read."""
        return Structuring(
            report=self.report, folder_of=self.document.folder_of, complete=self.complete
        )

    def section(
        self, kind: type[ConfigT], name: str, *, optional: bool = False
    ) -> Section[ConfigT]:
        """Read a section as a ``kind``.

        Args:
            optional: one that is not in the file is None, and not a ``kind`` of defaults.
        """
        value = self.document.values.get(name)
        if name in self.document.unreadable or (optional and value is None):
            return Section()
        known = len(self.problems)
        result = structure(kind, value, (name,), self.structuring)
        if result is not None:
            return Section(value=result, readable=result)
        if not isinstance(value, dict):
            value = None
        wrong = {problem.path[1] for problem in self.problems[known:] if len(problem.path) > 1}
        rest = {key: item for key, item in (value or {}).items() if key not in wrong}
        silent = attrs.evolve(self.structuring, report=lambda path, message: None)
        return Section(readable=structure(kind, rest, (name,), silent))

    def mapping(self, name: str, of: str) -> dict[str, object]:
        """Read a section that is a mapping of names to options; empty if it is anything else."""
        section = self.document.values.get(name)
        if section is not None and not isinstance(section, dict):
            self.report((name,), f"{section!r} must be a mapping {of} -> its options")
        return section if isinstance(section, dict) else {}

    def plugin(self, group: Group, name: str, path: KeyPath) -> Any:
        """Look a plugin up; None: it is not installed, or is broken."""
        try:
            return load_plugin(group, name)
        except PluginError as error:
            hint = ""
            known = plugin_names(group)
            if name not in known and not difflib.get_close_matches(name, known, n=1):
                hint = (
                    ". Each comes with a package of its own; those of this framework are extras of "
                    "distill-train (pip install 'distill-train[all]' brings every one)"
                )
            self.report(path, f"{error}{hint}")
            return None

    def roles(self) -> dict[str, RoleConfig]:
        """Read the roles; those with wrong keys are left out."""
        # Their paths may be hub ids: ``join_roles`` resolves them.
        read = {
            name: structure(RoleConfig, value, ("models", name), self.structuring)
            for name, value in self.mapping("models", "role").items()
        }
        return {name: role for name, role in read.items() if role is not None}

    def callbacks(self) -> CallbackSection:
        """Read the callbacks, and add those that are on by default."""
        written = self.mapping("callbacks", "callback")
        callbacks, off, notes = {}, [], []
        for name, value in written.items():
            path = ("callbacks", name)
            plugin: CallbackPlugin[Any] | None = self.plugin("distill.callbacks", name, path)
            if plugin is None:
                continue
            if plugin.on_by_default and value is None:
                off.append(name)
                continue
            config = structure(plugin.config_class, value, path, self.structuring)
            callbacks[name] = ConfiguredCallback(plugin=plugin, config=config)
        for name in plugin_names("distill.callbacks"):
            if name in written:
                continue
            try:
                found: CallbackPlugin[Any] = load_plugin("distill.callbacks", name)
            except PluginError as error:
                # Nobody asked for it: a run must not end for what it does not use.
                notes.append(f"callback {name} is left out, if it is on by default at all: {error}")
                continue
            if found.on_by_default:
                path = ("callbacks", name)
                config = structure(found.config_class, {}, path, self.structuring)
                callbacks[name] = ConfiguredCallback(plugin=found, config=config)
        return CallbackSection(callbacks=callbacks, off=tuple(off), notes=tuple(notes))


@frozen
class SamplerCompletion:
    """Gives each ``SamplerSpec`` with a ``DynamicShift`` the timesteps of this run's clips, and
    refuses a solver that the family does not have.

    It is applied to every value of every config before anybody sees it, so that samplers of a run
    always know their noise levels.

    Attributes:
        family: its name, for messages.
        count_tokens: counts those of one clip, where they are needed; None: the family cannot.
        solvers: that the family has; None: not known.
    """

    family: str
    count_tokens: Callable[[], int | None]
    solvers: Collection[Solver] | None = None

    def __call__(self, value: object) -> object:
        """Walk ``value``; what holds no such sampler is returned as it is.

        Raises:
            ValueError: there is one and the number of tokens is not known, or the family does not
                have a sampler's solver.
        """
        if isinstance(value, SamplerSpec):
            return self._resolved(value)
        if isinstance(value, dict):
            return {key: self(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple(self(item) for item in value)
        if attrs.has(type(value)):
            return self._walk(value)
        return value

    def _walk(self, config: Any) -> Any:
        now = {f.name: getattr(config, f.name) for f in attrs.fields(type(config)) if f.init}
        new = {name: self(item) for name, item in now.items()}
        changed = {name: item for name, item in new.items() if item != now[name]}
        return attrs.evolve(config, **changed) if changed else config

    def _resolved(self, spec: SamplerSpec) -> SamplerSpec:
        if self.solvers is not None and spec.solver not in self.solvers:
            raise ValueError(
                f"family {self.family!r} does not sample by solver {spec.solver} (it has "
                f"{', '.join(sorted(self.solvers))}). Write one of these"
            )
        if not isinstance(spec.shift, DynamicShift):
            return spec
        tokens = self.count_tokens()
        if tokens is not None:
            return spec.resolved(tokens)
        raise ValueError(
            f"the shift depends on the number of tokens of a clip, and family {self.family!r} "
            "cannot count how many its models make of one. Write a number for shift, or timesteps"
        )


UNKNOWN_SAMPLER = SamplerSpec(steps=1)
"""Stands for the student's sampler where ``method_config`` is wrong: nobody shall complain of it
once more."""


def planned_run(draft: Draft) -> PlannedRun:
    """Show the run to methods and callbacks, whose rules may refer to all of it."""
    read = {name: c for name, c in draft.callbacks.items() if c.config is not None}
    averaged = {role for c in read.values() for role in c.plugin.averages(c.config)}
    section = draft.document.values.get("callbacks") or {}
    off = draft.callback_section.off
    if not isinstance(section, dict) or section.keys() - read.keys() - set(off):
        # Callbacks that could not be read may keep an average of any role.
        averaged |= draft.written_roles
    method = draft.readable_method
    run = PlannedRun(
        roles={name: role.spec for name, role in draft.roles.items()},
        unread=draft.written_roles - set(draft.roles),
        averaged=frozenset(averaged),
        student_sampler=UNKNOWN_SAMPLER if method is None else method.config.student_sampler,
        has_negative=draft.has_negative is not False,
        reads_negative=draft.capabilities.reads_negative,
    )
    if draft.family is None:
        return run
    plugin, config = draft.family.plugin, draft.family.config
    ranges = {name: plugin.expert_ranges(spec, config) for name, spec in run.roles.items()}
    specs = run.roles.items()
    source = components_source(plugin, config, draft.roles) if draft.roles else None
    shapes = []
    if source is not None:
        # What is asked of the whole section is of the largest clip, which so comes first.
        configs = (config, *clip_configs(plugin, config))
        shapes = [plugin.latent_shape(one, source=source) for one in configs]

    def chunks(role: str, frames: int) -> tuple[Chunk, ...]:
        return plugin.chunks(run.roles[role], config, frames)

    return attrs.evolve(
        run,
        clip_frames=tuple(dict.fromkeys(shape[1] for shape in shapes if shape is not None)),
        chunks=chunks,
        experts=frozenset(name for name, own in ranges.items() if len(own) > 1),
        boundaries={
            n: max(low for low, _ in own.values()) for n, own in ranges.items() if len(own) > 1
        },
        time_limits={n: next(iter(own.values())) for n, own in ranges.items() if len(own) == 1},
        pictured=frozenset(
            name for name, spec in specs if plugin.frame_conditions(spec, config).least
        ),
    )
