"""What is sampled: from a path to roles with their weights and samplers. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from attrs import field, frozen
from distill_checkpoint import role_problems
from distill_conditioning import ConditioningConfig
from distill_protocols import (
    ConfigError,
    FamilyPlugin,
    PluginError,
    RoleOptions,
    RoleSpec,
    SamplerSpec,
)
from distill_protocols.exports import SPEC_FILE
from distill_runfile import InitFromConfig, ModelsConfig, Role, cli, read_models, read_source
from distill_runfile.problems import KeyPath
from distill_runfile.structure import Structuring, structure
from distill_runtime import UnreadableFileError, load_plugin, read_json_object
from distill_trainer.config import ValidationConfig

Weights = Literal["auto", "ema", "live"]
ConfigT = TypeVar("ConfigT")

RECORD_FILE = "samples.json"
"""Written last, also after an interrupt: what made the clips beside it."""
STUDENT = "student"
"""The role that a method trains to be sampled."""
DEFAULT_FPS = 16.0
"""Of clips whose run states no other (that of Wan)."""


@frozen(kw_only=True)
class SampledRole:
    """One role that is sampled.

    Attributes:
        spec: how it is built; frozen.
        sampler: how it is sampled unless the caller says otherwise; None: the caller must.
        weights: checkpoint whose trained weights it has; None: those of its path.
        ema: the checkpoint's averaged weights instead of its live ones.
        init_from: weights in place of those of its path, for a frozen role that has some.
    """

    spec: RoleSpec
    sampler: SamplerSpec | None
    weights: Path | None = None
    ema: bool = False
    init_from: InitFromConfig | None = None


@frozen(kw_only=True)
class SampleSource:
    """Models that are ready to be loaded and sampled.

    Attributes:
        name: of the checkpoint or the export, for people.
        folder: the checkpoint or the export.
        roles: by name; the first is the one that was asked for.
        pipeline: ``pipeline_config``, of the family's own class.
        components: folder or hub id of VAE, encoders and tokenizers.
        negative_prompt: of guided samplers.
        fps: of the run's clips.
        held: keeps a run from deleting the checkpoint, as long as this object is there.
    """

    name: str
    folder: Path
    family_plugin: FamilyPlugin[Any]
    roles: Mapping[str, SampledRole]
    pipeline: object
    components: str
    negative_prompt: str
    fps: float
    held: IO[bytes] | None = field(default=None, repr=False, eq=False)

    @property
    def default_output(self) -> Path:
        """Where clips go unless one says otherwise: beside the checkpoint or the export, into a
        folder that holds none of a former call."""
        first = self.folder.parent / "samples" / self.folder.name
        later = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
        return next(f for f in itertools.chain([first], later) if not (f / RECORD_FILE).exists())

    @property
    def main(self) -> str:
        """Name of the role that was asked for."""
        return next(iter(self.roles))


def read_sample_source(
    path: Path | str,
    *,
    role: str | None = None,
    weights: Weights = "auto",
    also: Sequence[str] = (),
    samplers: Mapping[str, SamplerSpec] | None = None,
    base: Path | str | None = None,
) -> SampleSource:
    """Read what ``path`` holds.

    Args:
        path: an export of any format, a checkpoint, or a run's output folder, whose newest
            checkpoint is taken.
        role: of a checkpoint; None: ``student``.
        weights: averaged (EMA) or live ones of a checkpoint; auto: averaged where there are any.
        also: further roles of the run, such as its teacher.
        samplers: by role, in place of what the run says.
        base: Diffusers folder or hub id of the model that an export of a format for other tools
            (``lora``, ``comfyui``) was made from; None: the hub id that it names.

    Raises:
        ConfigError: with every reason why it cannot be sampled.
        CheckpointError: there is no intact checkpoint.
    """
    folder = Path(path).expanduser().absolute()
    given = dict(samplers or {})
    if (folder / SPEC_FILE).is_file():
        return _read_export(folder, role, also, given, base)
    if not folder.is_dir():
        raise ConfigError(
            [
                f"{path}: no such folder. Name a run's output folder, a checkpoint, or the folder "
                "of an export"
            ]
        )
    if base is not None:
        raise ConfigError(
            [
                f"--base {base}: {path} is no export, and a checkpoint names the models of its "
                "run. Leave --base out"
            ]
        )
    checkpoint, held = cli.hold_newest_checkpoint(folder, "FROM")
    return _read_checkpoint(checkpoint, held, role or STUDENT, weights, also, given)


# -- a checkpoint ---------------------------------------------------------------------------------


def _read_checkpoint(
    checkpoint: Path,
    held: IO[bytes],
    role: str,
    weights: Weights,
    also: Sequence[str],
    samplers: Mapping[str, SamplerSpec],
) -> SampleSource:
    file = checkpoint / "config.json"
    models = read_models(file, role)
    for other in also:
        models = read_models(file, other)  # raises with the problems of that role
    sections = _Sections(file)
    validation = sections.read(ValidationConfig, "validation")
    conditioning = sections.read(ConditioningConfig, "conditioning")
    problems: list[str] = []
    roles = {}
    for name in dict.fromkeys([role, *also]):
        if name not in models.roles:
            problems.append(f"{name!r} is no role of this run (it has: {', '.join(models.roles)})")
            continue
        trained = not list(role_problems(checkpoint, name, ema=False))
        ema = trained and weights != "live" and not list(role_problems(checkpoint, name, ema=True))
        wanted = weights if name == role else "auto"
        problems += _weights_problems(checkpoint, models.roles[name], trained, wanted)
        sampler = samplers.get(name) or _sampler_of(name, models, validation)
        problems += _sampler_problems(name, sampler)
        roles[name] = SampledRole(
            spec=_frozen(models.roles[name].spec),
            sampler=sampler,
            weights=checkpoint if trained else None,
            ema=ema,
            init_from=None if trained else models.roles[name].init_from,
        )
    if problems:
        raise ConfigError(problems)
    kind = "EMA" if roles[role].ema else "live"
    return SampleSource(
        name=f"{checkpoint.name} ({kind} weights)" if roles[role].weights else checkpoint.name,
        folder=checkpoint,
        family_plugin=models.family_plugin,
        roles=roles,
        pipeline=models.pipeline,
        components=models.source,
        negative_prompt=(conditioning and conditioning.negative_prompt) or "",
        fps=validation.fps if validation else DEFAULT_FPS,
        held=held,
    )


def _weights_problems(
    checkpoint: Path, role: Role, trained: bool, weights: Weights
) -> Iterator[str]:
    name = role.spec.name
    if role.spec.heads is not None:
        yield f"{name!r} is a discriminator, which makes no clips. Name another role"
    elif role.spec.experts:
        yield (
            f"{name!r} has one expert alone ({', '.join(role.spec.experts)}), and a clip takes "
            "both. Export it with apps/export, which adds the other, and sample that"
        )
    elif role.spec.trainable and not trained:
        yield from (problem.message for problem in role_problems(checkpoint, name, ema=False))
    elif weights == "ema":
        yield from (problem.message for problem in role_problems(checkpoint, name, ema=True))


def _sampler_of(
    name: str, models: ModelsConfig, validation: ValidationConfig | None
) -> SamplerSpec | None:
    """How the run samples a role: the student as its method does, any other as a view does."""
    views = () if validation is None else validation.views.values()
    stated = [view.sampler for view in views if view.role == name and view.sampler is not None]
    own = models.method.student_sampler if name == STUDENT else None
    return own or next(iter(stated), None)


def _sampler_problems(name: str, sampler: SamplerSpec | None) -> Iterator[str]:
    if sampler is None:
        yield (
            f"nothing in the run file says how {name!r} is sampled (no validation view of it has a "
            "sampler). Give --steps, and --guidance and --shift where they are not 1"
        )


def _frozen(spec: RoleSpec) -> RoleSpec:
    """Keep what decides the numbers; how training held the weights does not matter here."""
    return RoleSpec(
        name=spec.name,
        path=spec.path,
        trainable=False,
        precision=spec.precision,
        lora=spec.lora,
        attention_backend=spec.attention_backend,
    )


# -- an export ------------------------------------------------------------------------------------


def _read_export(
    folder: Path,
    role: str | None,
    also: Sequence[str],
    samplers: Mapping[str, SamplerSpec],
    base: Path | str | None,
) -> SampleSource:
    file = folder / SPEC_FILE
    try:
        record = read_json_object(file)
    except UnreadableFileError as error:
        raise ConfigError([f"{error}. Export the role again"]) from error
    problems: list[str] = []

    def report(path: KeyPath, message: str) -> None:
        problems.append(f"{file}: {'.'.join(path)}: {message}")

    path, wrong = _path_of_export(folder, record, base)
    problems += wrong
    if also:
        problems.append(
            f"{folder} holds one role, so there is no {', '.join(map(repr, also))} beside it. Name "
            "the run's output folder or a checkpoint of it"
        )
    name = record.get("role")
    if not isinstance(name, str) or "family" not in record:
        problems.append(
            f"{file} does not say which family the model is of, as exports of earlier releases do "
            "not. Export the role again with apps/export"
        )
    if problems or not isinstance(name, str):
        raise ConfigError(problems)
    if role not in (None, name):
        problems.append(f"{folder} holds {name!r}, and no role {role!r}")
    family = _family(record, problems)
    how = Structuring(report=report)
    sampler = samplers.get(name) or structure(SamplerSpec, record.get("sampler"), ("sampler",), how)
    computed = {"precision": record.get("compute_precision")}
    options = structure(RoleOptions, computed, ("compute_precision",), how)
    if family is None or options is None:
        raise ConfigError(problems)
    spec = RoleSpec(name=name, path=path, trainable=False, precision=options.precision or "fp32")
    start = None if path == str(folder) else InitFromConfig(path=str(folder))
    values = record.get("pipeline_config")
    pipeline = structure(family.config_class, values, ("pipeline_config",), how)
    if pipeline is not None:
        problems += [problem.message for problem in family.role_problems(spec, pipeline)]
        if start is not None and not problems:
            problems += family.start_problems(spec, pipeline, start.path)
    if problems:
        raise ConfigError(problems)
    return SampleSource(
        name=folder.name,
        folder=folder,
        family_plugin=family,
        roles={name: SampledRole(spec=spec, sampler=sampler, init_from=start)},
        pipeline=pipeline,
        components=path,
        negative_prompt="",
        fps=DEFAULT_FPS,
    )


def _path_of_export(
    folder: Path, record: Mapping[str, object], base: Path | str | None
) -> tuple[str, list[str]]:
    """Return the folder or hub id that a pipeline is read from, and what is wrong with it: the
    export itself, or for weights alone (``lora``, ``comfyui``) the model that they are for."""
    if record.get("format") == "diffusers":
        if base is None:
            return str(folder), []
        return str(folder), [
            f"--base {base}: {folder} is a whole pipeline, so nothing of another model is in its "
            "clips. Leave --base out"
        ]
    if base is not None:
        local = Path(base).expanduser()
        return str(local.absolute() if local.exists() else base), []
    origin = str(record.get("path", ""))
    if origin.count("/") == 1 and not origin.startswith((".", "/", "~")):
        return origin, []  # a hub id: of a folder the record has the last name alone
    return "", [
        f"{folder} holds weights alone (format {record.get('format')!r}), without the rest of the "
        f"pipeline, which was that of a folder {origin!r}. Name it with --base FOLDER"
    ]


def _family(record: Mapping[str, object], problems: list[str]) -> FamilyPlugin[Any] | None:
    try:
        return load_plugin("distill.families", str(record["family"]))
    except PluginError as error:
        problems.append(str(error))
        return None


class _Sections:
    """Sections of a run file that are read where they are right, and left out where not."""

    def __init__(self, file: Path) -> None:
        self._values = read_source(file).values or {}

    def read(self, kind: type[ConfigT], name: str) -> ConfigT | None:
        value = self._values.get(name)
        if value is None:
            return None
        return structure(kind, value, (name,), Structuring(report=lambda path, message: None))
