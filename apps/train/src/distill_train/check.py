"""From a run file to a ``RunConfig``, or to every problem of the file at once. Imports no torch."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import define, evolve, field
from distill_checkpoint.config import CheckpointConfig
from distill_checkpoint.layout import checkpoints
from distill_checkpoint.listing import role_problems
from distill_checkpoint.manifest import is_checkpoint
from distill_conditioning import DatasetInfo, dataset_info
from distill_conditioning.config import ConditioningConfig, DataConfig
from distill_protocols import (
    CallbackPlugin,
    ConfigError,
    FamilyPlugin,
    LoraSpec,
    MethodPlugin,
    PlannedRun,
    PluginError,
    Problem,
    RoleNeed,
    RoleSpec,
    SamplerSpec,
)
from distill_runtime import load_plugin, plugin_names
from distill_trainer.config import OptimizerConfig, TrainingConfig, ValidationConfig

from distill_train.process_rules import process_problems, spread_problems, world_size_of
from distill_train.role_rules import key_problems
from distill_train.schema import (
    FamilyConfig,
    InitFromConfig,
    ModelsConfig,
    RecipeConfig,
    Role,
    RoleConfig,
    RunConfig,
    SampledConfig,
    components_source,
    is_local,
)
from distill_train.source import MODELS_FILE, Fault, Path_, Source, read_source
from distill_train.structure import resolve_path, structure, to_plain, unknown_key

SECTIONS = (
    "recipe", "models", "training", "data", "conditioning", "pipeline_config", "method_config",
    "checkpoint", "validation", "callbacks",
)  # fmt: skip
_NEEDED = ("recipe", "models", "training", "data", "pipeline_config")


def read_config(
    file: Path,
    models_json: Path | None = None,
    *,
    planning: bool = False,
    world_size: int | None = None,
) -> RunConfig:
    """Read and check a run file.

    Args:
        models_json: a JSON object role -> keys, laid over the file's ``models:`` key by key.
        planning: nothing will be started, so a data folder that is not there yet is no problem.
        world_size: processes that the run is meant for; None: as torchrun says, or one.

    Raises:
        ConfigError: with every problem that was found, each ``file:line: key: message``.
    """
    source = read_source(file)
    overlay = read_source(models_json, expected=MODELS_FILE) if models_json else None
    if source.values is None or (overlay and overlay.values is None):
        raise ConfigError([str(f) for s in (source, overlay) if s for f in s.problems])
    if world_size is None:
        world_size = world_size_of(os.environ)
    return _Check(source, overlay, planning, world_size).run()


def read_models(file: Path, role: str) -> ModelsConfig:
    """What ``file``, a run file or a checkpoint's ``config.json``, says of its models.

    Raises:
        ConfigError: with every problem of those sections, of other roles than ``role`` excepted:
            their folders may be gone.
    """
    source = read_source(file)
    if source.values is None:
        raise ConfigError([str(problem) for problem in source.problems])
    return _Check(source, None, planning=True).models(role)


def read_sampled(
    file: Path,
    section: str,
    config_class: type,
    rules: Callable[[SampledConfig], Iterable[tuple[Path_, str]]] = lambda config: (),
    *,
    planning: bool = False,
) -> SampledConfig:
    """Read and check another app's file: one frozen role, a data set, and a section of its own.

    Args:
        section: the app's; ``config_class`` has a field ``sampler``.
        rules: what else is wrong, across sections, once each is right by itself.
        planning: as in ``read_config``.

    Raises:
        ConfigError: as ``read_config``.
    """
    source = read_source(file)
    if source.values is None:
        raise ConfigError([str(problem) for problem in source.problems])
    return _Check(source, None, planning).sampled(section, config_class, rules)


@define
class _Check:
    source: Source
    overlay: Source | None
    planning: bool
    world_size: int = 1
    problems: list[Fault] = field(factory=list)

    def models(self, role: str) -> ModelsConfig:
        """Recipe, models, pipeline and method alone, and problems of one role alone."""
        self.problems += self.source.problems
        recipe = self._structure(RecipeConfig, "recipe")
        family, method = self._plugins(recipe)
        parts: dict[str, Any] = {
            "training": None,
            "checkpoint": None,
            "pipeline": family and self._structure(family.config_class, "pipeline_config"),
            "method": method and self._structure(method.config_class, "method_config"),
        }
        # A run that is over needs neither the optimizers nor the weights that it began with.
        configs = {
            name: evolve(written, optimizer={}, init_from=None)
            for name, written in self._role_configs().items()
        }
        roles = self._join(configs, recipe, family, method, parts)
        for section in ("recipe", "models", "pipeline_config"):
            if self.source.values.get(section) is None:
                self._problem((section,), "missing section; it says how the weights are used")
        self.problems = [
            f for f in self.problems if f.path[:1] != ("models",) or f.path[1:2] == (role,)
        ]
        if self.problems:
            self._raise()
        assert recipe is not None
        assert family is not None
        assert method is not None
        return ModelsConfig(
            recipe=recipe,
            roles=roles,
            pipeline=parts["pipeline"],
            method=parts["method"],
            family_plugin=family,
            method_plugin=method,
        )

    def sampled(
        self,
        section: str,
        config_class: type,
        rules: Callable[[SampledConfig], Iterable[tuple[Path_, str]]],
    ) -> SampledConfig:
        """One frozen role and what it is sampled on."""
        self.problems += self.source.problems
        needed = ("recipe", "models", "data", "pipeline_config", section)
        self._sections((*needed, "conditioning"), needed)
        recipe = self._structure(FamilyConfig, "recipe")
        family = recipe and self._plugin("distill.families", recipe.family, ("recipe", "family"))
        parts: dict[str, Any] = {
            "training": None,
            "checkpoint": None,
            "method": None,
            "data": self._structure(DataConfig, "data"),
            "conditioning": self._structure(ConditioningConfig, "conditioning"),
            "pipeline": family and self._structure(family.config_class, "pipeline_config"),
        }
        written = self._role_configs()
        for name in (name for name, role in written.items() if role.trainable):
            self._problem(("models", name, "trainable"), "true, but nothing learns here: the role "
                        "is sampled. Leave the key out")  # fmt: skip
        if len(self._written_roles()) != 1 and self.source.values.get("models") is not None:
            names = ", ".join(sorted(self._written_roles())) or "none"
            self._problem(("models",), f"{names}: one role is sampled, and another would only cost "
                        "memory. Name just one, the teacher")  # fmt: skip
        frozen = {name: evolve(role, trainable=False) for name, role in written.items()}
        roles = self._join(frozen, recipe, family, None, parts)
        facts = self._data(roles, family, None, parts)
        own = None
        if self.source.values.get(section) is not None:
            own = self._structure(config_class, section)
        if own is not None:
            run = PlannedRun(
                roles={name: role.spec for name, role in roles.items()},
                has_negative=_has_negative(parts["conditioning"], facts) is not False,
            )
            if family is not None and parts["pipeline"] is not None:
                # The data set brings the pictures that a model cannot be called without.
                run = evolve(_with_kinds(run, family, parts["pipeline"]), pictured=frozenset())
            for name in roles:
                for problem in run.sampler_problems(own.sampler, name):
                    self._problem((section, *problem.path), problem.message)
        if self.problems:
            self._raise()
        assert recipe is not None
        assert family is not None
        [role] = roles.values()
        config = SampledConfig(
            recipe=recipe,
            role=role,
            pipeline=parts["pipeline"],
            data=parts["data"],
            conditioning=parts["conditioning"],
            family_plugin=family,
            section=own,
        )
        for path, message in rules(config):
            self._problem(path, message)
        if self.problems:
            self._raise()
        return config

    def run(self) -> RunConfig:
        self.problems += self.source.problems
        if self.overlay:
            self.problems += self.overlay.problems
        self._sections()
        recipe = self._structure(RecipeConfig, "recipe")
        family, method = self._plugins(recipe)
        roles = self._role_configs()
        parts: dict[str, Any] = {
            "training": self._structure(TrainingConfig, "training"),
            "data": self._structure(DataConfig, "data"),
            "conditioning": self._structure(ConditioningConfig, "conditioning"),
            "checkpoint": self._structure(CheckpointConfig, "checkpoint"),
            "validation": None,
            "pipeline": family and self._structure(family.config_class, "pipeline_config"),
            "method": method and self._structure(method.config_class, "method_config"),
        }
        if self.source.values.get("validation") is not None:
            parts["validation"] = self._structure(ValidationConfig, "validation")
        training = parts["training"] or self._without_problems(TrainingConfig, "training")
        if training is not None:
            for problem in process_problems(training, self.world_size):
                self._problem(("training", *problem.path), problem.message)
        callback_plugins, callbacks = self._callbacks()
        complete = self._join(roles, recipe, family, method, parts)
        self._bases_are_frozen(complete)
        self._folders(parts)
        self._everyone_learns(complete, method, parts)
        facts = self._data(complete, family, method, parts)
        self._negative(method, parts, facts)
        run = self._planned(complete, method, parts, facts, callback_plugins, callbacks)
        if family is not None and parts["pipeline"] is not None:
            run = _with_kinds(run, family, parts["pipeline"])
        self._named_roles(run, parts, family)
        if method is not None and parts["method"] is not None:
            for problem in parts["method"].problems(run):
                self._problem(("method_config", *problem.path), problem.message)
        self._callback_rules(run, callback_plugins, callbacks)
        self._best_by_a_metric(parts, callback_plugins, callbacks)
        if self.problems:
            self._raise()
        # Each of them missing is a problem.
        assert recipe is not None
        assert family is not None
        assert method is not None
        keys = {"pipeline": "pipeline_config", "method": "method_config"}
        resolved = {
            "recipe": to_plain(recipe),
            "models": {name: _resolved_role(recipe, role) for name, role in complete.items()},
            **{keys.get(part, part): to_plain(value) for part, value in parts.items()},
            "callbacks": {name: to_plain(config) for name, config in callbacks.items()},
        }
        return RunConfig(
            recipe=recipe,
            roles=complete,
            callbacks=callbacks,
            family_plugin=family,
            method_plugin=method,
            callback_plugins=callback_plugins,
            resolved=resolved,
            **parts,
        )

    # -- sections -----------------------------------------------------------------------------

    def _problem(self, path: Path_, message: str) -> None:
        from_overlay = self.overlay is not None and path[:1] == ("models",)
        if from_overlay and path[1:] in self.overlay.lines:  # type: ignore[union-attr]
            self.problems.append(self.overlay.problem(path[1:], message))  # type: ignore[union-attr]
        else:
            self.problems.append(self.source.problem(path, message))

    def _raise(self) -> None:
        ordered = sorted(
            dict.fromkeys(self.problems), key=lambda f: (f.file != self.source.file, f.line)
        )
        raise ConfigError([str(problem) for problem in ordered])

    def _sections(
        self, known: tuple[str, ...] = SECTIONS, needed: tuple[str, ...] = _NEEDED
    ) -> None:
        for key in self.source.values:
            if key not in known:
                self._problem((key,), unknown_key(key, known, owner=""))
        for key in needed:
            if self.source.values.get(key) is None:
                every = f"{', '.join(needed[:-1])} and {needed[-1]}"
                self._problem((key,), f"missing section; every run file has {every}")

    def _structure(self, cls: type, section: str) -> Any:
        if section in _NEEDED and self.source.values.get(section) is None:
            return None
        value = self.source.values.get(section)
        return structure(
            cls, value, (section,), self._problem, base=self.source.file.parent.resolve()
        )

    def _without_problems(self, cls: type, section: str) -> Any:
        """The section with its faulty keys left out, so that rules that lean on it still speak."""
        value = self.source.values.get(section)
        bad = {
            problem.path[1]
            for problem in self.problems
            if problem.path[:1] == (section,) and problem.path[1:]
        }
        rest = {k: v for k, v in value.items() if k not in bad} if isinstance(value, dict) else None
        return structure(cls, rest, (section,), lambda *_: None, base=Path())

    # -- plugins ------------------------------------------------------------------------------

    def _plugins(
        self, recipe: RecipeConfig | None
    ) -> tuple[FamilyPlugin | None, MethodPlugin | None]:
        if recipe is None:
            return None, None
        return (
            self._plugin("distill.families", recipe.family, ("recipe", "family")),
            self._plugin("distill.methods", recipe.method, ("recipe", "method")),
        )

    def _plugin(self, group: Any, name: str, path: Path_) -> Any:
        try:
            return load_plugin(group, name)
        except PluginError as error:
            self._problem(path, str(error))
            return None

    def _callbacks(self) -> tuple[dict[str, CallbackPlugin], dict[str, Any]]:
        plugins, configs = {}, {}
        section = self.source.values.get("callbacks") or {}
        if not isinstance(section, dict):
            self._problem(("callbacks",), f"{section!r} must be a mapping callback -> its options")
            return {}, {}
        for name, value in section.items():
            path = ("callbacks", name)
            plugin = self._plugin("distill.callbacks", name, path)
            if plugin is None:
                continue
            config = structure(
                plugin.config_class,
                value,
                path,
                self._problem,
                base=self.source.file.parent.resolve(),
            )
            plugins[name], configs[name] = plugin, config
        return plugins, configs

    # -- roles --------------------------------------------------------------------------------

    def _role_configs(self) -> dict[str, RoleConfig]:
        section = self.source.values.get("models")
        if section is None:
            return {}
        if not isinstance(section, dict):
            self._problem(("models",), f"{section!r} must be a mapping role -> its options")
            return {}
        merged = dict(section)
        if self.overlay:
            for name, value in self.overlay.values.items():
                old = merged.get(name)
                both = isinstance(old, dict) and isinstance(value, dict)
                merged[name] = {**old, **value} if both else value  # type: ignore[dict-item]
        roles = {}
        for name, value in merged.items():
            role = structure(RoleConfig, value, ("models", name), self._problem, base=Path())
            if role is not None:
                roles[name] = role
        return roles

    def _base_of(self, name: str, key: str) -> Path:
        overlaid = self.overlay is not None and (name, key) in self.overlay.lines
        file = self.overlay.file if overlaid and self.overlay else self.source.file
        return file.parent.resolve()

    def _join(
        self,
        roles: Mapping[str, RoleConfig],
        recipe: RecipeConfig | FamilyConfig | None,
        family: FamilyPlugin | None,
        method: MethodPlugin | None,
        parts: Mapping[str, Any],
    ) -> dict[str, Role]:
        """Rules across sections: roles against method and family, capabilities, paths."""
        method_config, pipeline = parts["method"], parts["pipeline"]
        if method is not None and method_config is None:
            method_config = self._without_problems(method.config_class, "method_config")
        needs: dict[str, RoleNeed] = {}
        if method is not None and method_config is not None:
            needs = {need.name: need for need in method_config.roles}
            self._check_roles(roles, needs, method)
            if family is not None and pipeline is not None:
                self._check_capabilities(family, pipeline, method, method_config)
        if family is not None and pipeline is not None:
            for problem in family.config_problems(pipeline, self._written_roles()):
                self._problem(("pipeline_config", *problem.path), problem.message)
        complete = {}
        broken = self._written_roles().difference(roles)  # with problems of their own
        for name, role in roles.items():
            if recipe and role.family not in (None, recipe.family):
                self._problem(
                    ("models", name, "family"),
                    f"{role.family!r} differs from recipe.family {recipe.family!r}: one adapter "
                    "calls all roles, so all belong to one family. Leave the key out",
                )
            need = needs.get(name)
            leans_on = {role.base, role.heads and role.heads.on}
            if leans_on.isdisjoint(broken):
                heads = bool(need and need.features_of)
                for problem in key_problems(name, roles, discriminator=heads):
                    self._problem(("models", name, *problem.path), problem.message)
            spec = self._spec(name, roles, need)
            if spec is None:
                continue
            if family is not None and pipeline is not None:
                for option in sorted(set(spec.options_set()) - set(family.role_options(pipeline))):
                    self._problem(
                        ("models", name, option),
                        f"family {family.name!r} does not honour this option, so it would have no "
                        "effect. Leave it out, or use a family that does",
                    )
                for problem in family.role_problems(spec, pipeline):
                    self._problem(("models", name, *problem.path), problem.message)
            if role.lora and not spec.trainable and role.init_from is None and needs:
                self._problem(
                    ("models", name, "lora"),
                    f"role {name!r} is frozen, so its adapters would stay at B A = 0, where they "
                    "change nothing. Remove lora, or name trained ones with init_from",
                )
            if role.optimizer and not spec.trainable and (needs or role.trainable is False):
                self._problem(
                    ("models", name, "optimizer"),
                    f"role {name!r} is frozen, so its optimizer would never step. Remove these "
                    "keys",
                )
            if parts["training"] is not None:
                for problem in spread_problems(spec, parts["training"], self.world_size):
                    self._problem(("models", role.base or name, *problem.path), problem.message)
            if spec.offload and spec.trainable:
                self._problem(
                    ("models", name, "offload"),
                    f"true, but {name!r} learns: gradients and moments stay beside the weights. "
                    "Use fsdp: {cpu_offload: true}, which moves them together",
                )
            optimizer = self._optimizer(name, role, parts["training"]) if spec.trainable else None
            init_from = role.init_from and self._init_from(name, role.init_from)
            complete[name] = Role(spec=spec, optimizer=optimizer, init_from=init_from)
            if init_from and family is not None and pipeline is not None:
                if _goes_on(complete[name], parts):
                    continue  # the run's own checkpoint holds the role: nobody reads these again
                for problem in _init_problems(init_from, complete[name], family, pipeline):
                    self._problem(("models", name, "init_from", *problem.path), problem.message)
        return complete

    def _spec(
        self, name: str, roles: Mapping[str, RoleConfig], need: RoleNeed | None
    ) -> RoleSpec | None:
        """None where nothing says what the model is."""
        role = roles[name]
        # What a role with a base does not say is the base's.
        home = name if role.base is None else role.base
        model = roles.get(home, role)
        # Heads have no model, and are built for that of another role; their other keys are theirs.
        owner = home if role.heads is None else _model_of(role.heads.on, roles)
        written = roles[owner].path if owner in roles else None
        if written is None:
            return None
        trainable = role.trainable
        if trainable is None:
            # A role that nobody needs has its problem already, and shall draw no other.
            trainable = need is None or need.trainable
        return RoleSpec(
            name=name,
            path=self._resolved(written, owner, "path"),
            trainable=trainable,
            precision=model.precision or "fp32",
            lora=role.lora,
            fsdp=model.fsdp,
            base=role.base,
            activation_checkpointing=role.activation_checkpointing,
            compile=role.compile,
            offload=role.offload,
            heads=role.heads,
        )

    def _bases_are_frozen(self, roles: Mapping[str, Role]) -> None:
        for name, role in roles.items():
            base = roles.get(role.spec.base or "")
            if base is not None and base.spec.trainable:
                self._problem(
                    ("models", name, "base"),
                    f"{role.spec.base!r} learns, so its weights would move under the adapters. "
                    "Name a frozen role, such as the teacher",
                )

    def _init_from(self, name: str, written: InitFromConfig) -> InitFromConfig:
        path = self._resolved(written.path, name, "init_from")
        return evolve(written, path=path, role=written.role or name)

    def _resolved(self, path: str, role: str, key: str) -> str:
        return resolve_path(path, self._base_of(role, key)) if is_local(path) else path

    def _written_roles(self) -> set[str]:
        """Names under ``models:``, whatever is wrong with them."""
        sources = [self.source.values.get("models"), self.overlay and self.overlay.values]
        return {name for values in sources if isinstance(values, dict) for name in values}

    def _check_capabilities(
        self, family: FamilyPlugin, pipeline: Any, method: MethodPlugin, config: Any
    ) -> None:
        missing = family.capabilities(pipeline).missing(config.capabilities)
        if missing:
            self._problem(
                ("recipe", "method"),
                f"{method.name} needs {', '.join(missing)}, which family {family.name} with this "
                "pipeline_config has not (causal:<role> is a role that pipeline_config lets make "
                "videos chunk by chunk); choose other options of the two, or another family",
            )

    def _check_roles(
        self, roles: Mapping[str, RoleConfig], needs: Mapping[str, RoleNeed], method: MethodPlugin
    ) -> None:
        written = self._written_roles()
        for name, need in needs.items():
            if name not in written:
                self._problem(
                    ("models", name),
                    f"missing role; {method.name} calls {', '.join(needs)} "
                    f"({name}: {need.help or 'needed'})" + (need.reason and f": {need.reason}"),
                )
            elif name in roles and roles[name].trainable not in (None, need.trainable):
                self._problem(("models", name, "trainable"), _wrong_trainable(need, method.name))
            if name in roles:
                for problem in _heads_as_needed(roles, need, method.name):
                    self._problem(("models", name, "heads", *problem.path), problem.message)
        for name in roles:
            if name not in needs:
                near = difflib.get_close_matches(name, needs, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                self._problem(
                    ("models", name),
                    f"{method.name} calls no role {name!r}{hint} (it calls: {', '.join(needs)}); "
                    "an unused role only costs memory",
                )

    def _optimizer(
        self, name: str, role: RoleConfig, training: TrainingConfig | None
    ) -> OptimizerConfig | None:
        """``training.optimizer`` with this role's keys laid over it."""
        if training is None:
            return None
        path = ("models", name, "optimizer")
        merged = {**to_plain(training.optimizer), **role.optimizer}
        return structure(OptimizerConfig, merged, path, self._problem, base=Path())

    # -- the rest -----------------------------------------------------------------------------

    def _named_roles(
        self, run: PlannedRun, parts: Mapping[str, Any], family: FamilyPlugin | None
    ) -> None:
        """Roles that sections and callbacks name, and the averages that they ask for."""
        validation = parts["validation"]
        for name, view in (validation.views if validation else {}).items():
            shown = evolve(run, pictured=frozenset()) if validation.images else run
            for problem in (
                *shown.role_problems(view.role, ema=view.ema),
                *shown.sampler_problems(view.sampler, view.role),
            ):
                self._problem(("validation", "views", name, *problem.path), problem.message)
        exports = parts["checkpoint"].export if parts["checkpoint"] else ()
        for i, export in enumerate(exports):
            for problem in run.role_problems(export.role, ema=export.ema):
                self._problem(("checkpoint", "export", str(i), *problem.path), problem.message)
            if family is not None and export.role in run.roles:
                request = export.request(run.student_sampler or SamplerSpec(steps=1))
                for problem in family.export_problems(run.roles[export.role], request):
                    self._problem(("checkpoint", "export", str(i), *problem.path), problem.message)

    def _callback_rules(
        self, run: PlannedRun, plugins: Mapping[str, CallbackPlugin], configs: Mapping[str, Any]
    ) -> None:
        for name, config in configs.items():
            if config is not None:
                for problem in plugins[name].problems(config, run):
                    self._problem(("callbacks", name, *problem.path), problem.message)

    def _best_by_a_metric(
        self,
        parts: Mapping[str, Any],
        plugins: Mapping[str, CallbackPlugin],
        configs: Mapping[str, Any],
    ) -> None:
        """checkpoint.keep_best against what callbacks say that they measure, and when."""
        training, checkpoint = parts["training"], parts["checkpoint"]
        if training is None or checkpoint is None or checkpoint.keep_best is None:
            return
        metric = checkpoint.keep_best.metric
        measured: dict[str, int] = {}
        for name, config in configs.items():
            if config is not None:
                measured |= plugins[name].metrics(config)
        owner = metric.split("/")[0]
        if metric not in measured:
            if owner in plugin_names("distill.callbacks") and (measured or owner not in configs):
                near = difflib.get_close_matches(metric, measured, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                self._problem(
                    ("checkpoint", "keep_best", "metric"),
                    f"{metric!r} is measured by no callback of this file{hint} (measured: "
                    f"{', '.join(measured) or 'none'}); name one, or add the callback",
                )
            return  # a method's own number, which is known when it runs
        looks, saves = measured[metric], checkpoint.every_steps or 0
        both = math.lcm(looks, saves)
        if not 0 < both <= training.max_train_steps:
            self._problem(
                ("checkpoint", "keep_best", "metric"),
                f"{metric!r} is measured every {looks} iterations and saves come every {saves} "
                f"(0: at the end only), which never meet in {training.max_train_steps} iterations; "
                f"a checkpoint is judged by what was measured in its own. Set callbacks.{owner}"
                ".every_steps and checkpoint.every_steps alike",
            )

    def _folders(self, parts: Mapping[str, Any]) -> None:
        training, checkpoint, data = parts["training"], parts["checkpoint"], parts["data"]
        if training is not None and Path(training.output_dir).is_file():
            self._problem(("training", "output_dir"), f"{training.output_dir} is a file; a run "
                        "writes many, into a folder of its own")  # fmt: skip
        if training is not None and data is not None and training.output_dir == data.path:
            self._problem(("training", "output_dir"), f"{data.path} is the data set's folder; a "
                        "run writes into a folder of its own")  # fmt: skip
        resume = checkpoint.resume if checkpoint is not None else "none"
        if resume not in ("none", "latest") and not Path(resume).is_dir():
            self._problem(("checkpoint", "resume"), f"there is no folder {resume}; write latest, "
                        "none, or the path of one checkpoint-<iteration> folder")  # fmt: skip

    def _everyone_learns(
        self, roles: Mapping[str, Role], method: MethodPlugin | None, parts: Mapping[str, Any]
    ) -> None:
        if method is None or parts["method"] is None or parts["training"] is None:
            return
        steps = parts["training"].max_train_steps
        # No schedule of updates is longer than this; a run may be.
        seen = {r for i in range(1, min(steps, 10_000) + 1) for r in parts["method"].turns(i)}
        for name in (n for n, role in roles.items() if role.spec.trainable and n not in seen):
            self._problem(("training", "max_train_steps"), f"{steps} iterations hold no update of "
                        f"{name}, which would come out as it went in. Train longer, or have it "
                        "updated more often (method_config)")  # fmt: skip

    def _planned(
        self,
        roles: Mapping[str, Role],
        method: MethodPlugin | None,
        parts: Mapping[str, Any],
        facts: DatasetInfo | None,
        plugins: Mapping[str, CallbackPlugin],
        callbacks: Mapping[str, Any],
    ) -> PlannedRun:
        written = self._written_roles()
        averaged = {
            role
            for name, config in callbacks.items()
            for role in (plugins[name].averages(config) if config is not None else written)
        }
        section = self.source.values.get("callbacks") or {}
        if not isinstance(section, dict) or set(section) - set(plugins):
            averaged |= written  # who knows what the callbacks that could not be read would keep
        return PlannedRun(
            roles={name: role.spec for name, role in roles.items()},
            unread=frozenset(written - set(roles)),
            averaged=frozenset(averaged),
            student_sampler=self._student_sampler(method, parts["method"]),
            has_negative=_has_negative(parts["conditioning"], facts) is not False,
        )

    def _student_sampler(self, method: MethodPlugin | None, config: Any) -> SamplerSpec | None:
        if method is not None and config is None:
            config = self._without_problems(method.config_class, "method_config")
        if method is None or config is None:
            # Not known, which is reported already: nobody shall complain of it once more.
            return SamplerSpec(steps=1)
        return config.student_sampler

    def _data(
        self,
        roles: Mapping[str, Role],
        family: FamilyPlugin | None,
        method: MethodPlugin | None,
        parts: Mapping[str, Any],
    ) -> DatasetInfo | None:
        """The data set against the model; None where there is none to look at."""
        data, pipeline = parts["data"], parts["pipeline"]
        if data is None or (self.planning and not Path(data.path).exists()):
            return None
        latents = None
        shapes: dict[str, tuple[int, ...]] = {}
        if family and pipeline and roles:
            latents = family.latent_shape(
                pipeline, source=components_source(family, pipeline, roles)
            )
            # Of roles, not of the components: it is the transformers that read conditions.
            for role in roles.values():
                shapes = {**family.condition_shapes(pipeline, source=role.spec.path), **shapes}
        times: tuple[float, ...] = ()
        if method is not None and parts["method"] is not None:
            times = parts["method"].trajectory_times
        facts = dataset_info(data.path, latent_shape=latents, condition_shapes=shapes, times=times)
        for message in facts.problems:
            self._problem(("data", "path"), message)
        return facts

    def _negative(
        self, method: MethodPlugin | None, parts: Mapping[str, Any], facts: DatasetInfo | None
    ) -> None:
        """A negative condition for everyone who needs it."""
        if _has_negative(parts["conditioning"], facts) is not False:
            return
        for who in self._who_needs_negative(method, parts):
            self._problem(
                ("conditioning", "negative_prompt"),
                f"there is none, neither here nor in the data set, but {who}. Write the prompt "
                'here ("" is Diffusers\' default), or preprocess the data set with one',
            )

    def _who_needs_negative(
        self, method: MethodPlugin | None, parts: Mapping[str, Any]
    ) -> Iterator[str]:
        if method and parts["method"] and parts["method"].needs_negative:
            yield f"{method.name} guides a model, u + w (c - u), and u is its prediction for it"
        if parts["conditioning"].dropout > 0:
            yield "conditioning.dropout puts it in a caption's place"


def _model_of(name: str, roles: Mapping[str, RoleConfig]) -> str:
    """Whose path says what the model of role ``name`` is."""
    role = roles.get(name)
    return name if role is None or role.base is None else role.base


def _heads_as_needed(
    roles: Mapping[str, RoleConfig], need: RoleNeed, method: str
) -> Iterator[Problem]:
    """What is wrong with having heads, or none: pairs of a key in them and a message."""
    heads = roles[need.name].heads
    if heads is None and need.features_of:
        yield Problem(
            (),
            f"missing: {method} calls {need.name} as a discriminator ({need.help}). Write heads: "
            f"{{on: {need.features_of[0]}, blocks: [...]}}",
        )
    elif heads is not None and not need.features_of:
        yield Problem(
            (), f"{method} calls {need.name} as a model, and heads are none. Write path instead"
        )
    elif heads is not None and heads.on in roles and heads.on not in need.features_of:
        yield Problem(
            ("on",),
            f"{heads.on!r} is not what {method} takes features of with this method_config; it must "
            f"be {' or '.join(need.features_of)}",
        )


def _has_negative(
    conditioning: ConditioningConfig | None, facts: DatasetInfo | None
) -> bool | None:
    """Whether there will be a negative condition; None: it cannot be told yet."""
    if conditioning is None or conditioning.negative_prompt is not None:
        return True
    return None if facts is None else facts.has_negative


def _goes_on(role: Role, parts: Mapping[str, Any]) -> bool:
    """Whether the role's weights will come from this run's own checkpoint."""
    training, checkpoint = parts["training"], parts["checkpoint"]
    if training is None or checkpoint is None:
        return False
    return role.comes_from_checkpoint(checkpoint, Path(training.output_dir))


def _init_problems(
    init_from: InitFromConfig, role: Role, family: FamilyPlugin, pipeline: Any
) -> Iterator[Problem]:
    """What is wrong with the weights that a role shall start with: pairs of key and message."""
    path = Path(init_from.path)
    stored = is_local(init_from.path) and is_checkpoint(path)
    if role.spec.heads is not None and not stored:
        yield Problem(
            "path",
            f"{init_from.path} must be a checkpoint folder, as only those hold discriminators. "
            "Leave init_from out to begin with new heads",
        )
        return
    if stored:
        source = init_from.role or role.spec.name
        found = list(role_problems(path, source, ema=init_from.ema))
        yield from found or _stored_problems(path, source, role, family)
        return
    inside = checkpoints(path) if is_local(init_from.path) else {}
    if inside:
        yield Problem(
            "path",
            f"{path} is a run's output folder; name the checkpoint in it that is meant "
            f"({', '.join(folder.name for folder in list(inside.values())[:3])} ...)",
        )
        return
    for problem in family.role_problems(
        evolve(role.spec, path=init_from.path, lora=None), pipeline
    ):
        yield Problem("path", problem.message)
    if role.spec.lora is not None:
        yield Problem(
            "path", _whole_under_lora(init_from.path, role, f"write path: {init_from.path}")
        )
    for message in family.weights_problems(role.spec, init_from.path):
        yield Problem("path", message)
    for key, given in (("ema", init_from.ema), ("role", init_from.role != role.spec.name)):
        if given:
            yield Problem(
                key,
                f"{init_from.path} is no checkpoint but a model's folder, which holds one set of "
                "weights; leave this key out",
            )


def _stored_problems(
    checkpoint: Path, source: str, role: Role, family: FamilyPlugin
) -> Iterator[Problem]:
    """Whole weights against whole ones, adapters against adapters.

    Adapters carry neither their scale nor their base: both runs must say the same of the scale.
    """
    values = read_source(checkpoint / "config.json").values
    if values is None:
        yield Problem(
            "path",
            f"{checkpoint} cannot be read: its config.json is missing or damaged; name another "
            "checkpoint",
        )
        return
    written = (values.get("models") or {}).get(source) or {}
    heads = role.spec.heads and {
        "blocks": list(role.spec.heads.blocks),
        "width": role.spec.heads.width,
    }
    theirs = written.get("heads") and {key: written["heads"][key] for key in ("blocks", "width")}
    if heads != theirs:
        yield Problem(
            "path",
            f"{checkpoint} holds {source} as {_told(theirs)}, and {role.spec.name} is "
            f"{_told(heads)}; weights of one fit no other. Give both the same heads",
        )
        return
    if heads is not None:
        return
    lora, now = written.get("lora"), role.spec.lora
    if lora is None:
        if now is not None:
            export = f"export {source} of it (--format diffusers) and make that the path"
            yield Problem("path", _whole_under_lora(checkpoint, role, export))
        for message in family.weights_problems(role.spec, written.get("path", role.spec.path)):
            yield Problem("path", f"{checkpoint}: {message}")
        return
    then = LoraSpec(**{**lora, "target_modules": tuple(lora["target_modules"])})
    if now is None or (then.rank, then.scale) != (now.rank, now.scale):
        yield Problem(
            "path",
            f"{checkpoint} holds adapters of {source!r} alone, of rank {then.rank} and alpha / "
            f"rank {then.scale:g}, and {role.spec.name} has "
            f"{f'rank {now.rank} and {now.scale:g}' if now else 'no lora'}; the same numbers would "
            "mean other weights. Give the role the same lora, or export that one merged "
            "(--format diffusers) and start from the export",
        )


def _told(heads: Mapping[str, Any] | None) -> str:
    if heads is None:
        return "a model"
    return f"heads on blocks {', '.join(map(str, heads['blocks']))} of width {heads['width']}"


def _whole_under_lora(start: object, role: Role, way_out: str) -> str:
    return (
        f"{start} holds whole weights, but the base of {role.spec.name}'s lora is what its path "
        "says: checkpoints hold the adapters alone, and an export would merge them into other "
        f"weights than they were trained beside. Without init_from, {way_out}"
    )


def _with_kinds(run: PlannedRun, family: FamilyPlugin, pipeline: Any) -> PlannedRun:
    """``run`` with what its models need to be sampled."""
    roles = run.roles.items()
    return evolve(
        run,
        experts=frozenset(n for n, spec in roles if family.expert_ranges(spec, pipeline)),
        pictured=frozenset(n for n, spec in roles if family.needs_image(spec, pipeline)),
    )


def _resolved_role(recipe: RecipeConfig, role: Role) -> dict[str, Any]:
    """As a run file could hold it, with nothing left to defaults or to relative paths."""
    spec = role.spec
    model = {"path": spec.path, "precision": spec.precision, "fsdp": _plain(spec.fsdp)}
    if spec.heads is not None:
        model = {**model, "heads": to_plain(spec.heads)}
        del model["path"]
    return {
        "family": recipe.family,
        **(model if spec.base is None else {"base": spec.base}),
        "trainable": spec.trainable,
        "init_from": _plain(role.init_from),
        "lora": _plain(spec.lora),
        "activation_checkpointing": spec.activation_checkpointing,
        "compile": _plain(spec.compile),
        "offload": spec.offload,
        "optimizer": _plain(role.optimizer) or {},
    }


def _plain(value: Any) -> Any:
    return None if value is None else to_plain(value)


def _wrong_trainable(need: RoleNeed, method: str) -> str:
    if need.trainable:
        return (
            f"{need.name} is frozen here, but {method} updates it. Write trainable: true, or "
            "leave the key out"
        )
    return (
        f"{need.name} is trainable here, but {method} never updates it: it is a fixed target. "
        "Write trainable: false, or leave the key out"
    )
