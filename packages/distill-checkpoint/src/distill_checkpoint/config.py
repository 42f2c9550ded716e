"""When to save, what to keep, what to export. No torch here: run files are checked without it."""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import Any, Literal

from attrs import Attribute, field, frozen
from distill_protocols import ExportRequest, SamplerSpec
from distill_protocols.validators import file_name_problem

_RESERVED = frozenset(
    {
        "run.json", "metrics.jsonl", "tensorboard", "wandb", "validation", "cache", "profile",
        "debug", "report.json", "contact_sheet.png", "clips.mp4",
        "report", "report.html", "health.jsonl", "run_record.json", "samples", "mlruns", "trackio",
    }
)  # fmt: skip
"""Names in an output folder that a run, its trackers and callbacks write themselves."""


def _at_least_one(_: object, attribute: Attribute[Any], value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(
            f"{value} must be at least 1: it counts. Leave {attribute.name} out for its default."
        )


@frozen(kw_only=True)
class ExportConfig:
    """One role to write where other tools read it, when the run is complete.

    Attributes:
        role: a role of the run.
        folder: where to write it, relative to the output folder, e.g. ``export/student``.
        ema: export the role's EMA weights instead of the live ones.
        format: ``diffusers`` (a pipeline folder), ``comfyui`` (one file under the model's original
            names) or ``lora`` (adapters alone). The first two merge a LoRA role into its base.
        precision: of the written weights; left out, as they are.
        lora_rank: for ``format: lora`` of a role that is none: extract adapters of this rank.
        verify: read the result back with the reader that it is for, and compare outputs.
    """

    role: str = field()
    folder: str = field()
    ema: bool = False
    format: str = "diffusers"
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    lora_rank: int | None = field(default=None, validator=_at_least_one)
    verify: bool = False

    def request(self, sampler: SamplerSpec) -> ExportRequest:
        """Make the request to the family's exporter."""
        return ExportRequest(
            sampler=sampler,
            weights="ema" if self.ema else "live",
            format=self.format,
            precision=self.precision,
            lora_rank=self.lora_rank,
        )

    @role.validator
    def _check_role(self, attribute: object, value: str) -> None:
        if not value:
            raise ValueError("an export must name its role; name one of the run")

    @folder.validator
    def _check_folder(self, attribute: object, value: str) -> None:
        path = PurePosixPath(value)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(
                f"{value!r} must be a folder inside the output folder (relative, without '..'), "
                "because a run writes nowhere else; for example 'export/student'"
            )
        if path.parts[0].startswith((".", "checkpoint-")):
            raise ValueError(
                f"{value!r} must not begin with '.' or 'checkpoint-': such names in the output "
                "folder belong to the checkpoints, which are deleted by age; for example "
                "'export/student'"
            )
        for problem in filter(None, map(file_name_problem, path.parts)):
            raise ValueError(problem)
        if path.parts[0] in _RESERVED:
            raise ValueError(
                f"{value!r} must not begin with {path.parts[0]!r}: the run itself writes that into "
                "the output folder, and one would overwrite the other; for example 'export/student'"
            )


_CHANGEABLE = ("roles", "optimizers", "ema", "callbacks")
"""What ``ChangesConfig`` may name: ``roles.critic``, ``callbacks.report`` ... and ``data``."""


def _check_entries(_: object, attribute: object, value: tuple[str, ...]) -> None:
    for entry in value:
        kind, dot, name = entry.partition(".")
        if entry == "data":
            continue
        if kind not in _CHANGEABLE or not dot or not name:
            raise ValueError(
                f"{entry!r} must be one of {', '.join(f'{kind}.<name>' for kind in _CHANGEABLE)}, "
                "data, because that is what a run can gain or lose; for example 'roles.critic' or "
                "'callbacks.report'"
            )
    twice = sorted({entry for entry in value if value.count(entry) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is listed twice; once is enough")


@frozen(kw_only=True)
class ChangesConfig:
    """What a resumed run has more or less than the checkpoint, listed so that it is no accident.

    An entry is ``roles.<role>`` (its modules, optimizers, schedules and averages),
    ``optimizers.<role>`` (with its schedules), ``ema.<role>`` or ``callbacks.<name>``. What is
    in both lists starts anew: ``optimizers.student`` with new settings.
    That happens once: checkpoints that were saved under these rules are taken as they are.
    ``data`` in both lists: another data set (or seed, or order of samples) is read from its
    beginning.

    Attributes:
        added: in the run only; starts as a fresh run would have it.
        dropped: in the checkpoint only; is not loaded.
    """

    added: tuple[str, ...] = field(default=(), validator=_check_entries)
    dropped: tuple[str, ...] = field(default=(), validator=_check_entries)

    @dropped.validator
    def _check_data(self, attribute: object, value: tuple[str, ...]) -> None:
        if ("data" in value) != ("data" in self.added):
            raise ValueError(
                "'data' is in one of added and dropped; a run always has a data set, so another "
                "one is both: list it in both"
            )


@frozen(kw_only=True)
class KeepBestConfig:
    """Checkpoints to keep for what was measured in their iteration.

    Attributes:
        metric: as trackers name it, e.g. ``report/student_2/fd``.
        mode: whether low or high is good.
        count: how many stay.
    """

    metric: str = field()
    mode: Literal["min", "max"] = "min"
    count: int = field(default=1, validator=_at_least_one)

    @metric.validator
    def _check_metric(self, attribute: object, value: str) -> None:
        if not value:
            raise ValueError("keep_best must name a metric, such as 'report/student_2/fd'")


@frozen(kw_only=True)
class CheckpointConfig:
    """When to save, what to keep, where to resume from, what to export at the end.

    Attributes:
        every_steps: save after every so many iterations; null saves only at the end. A crash costs
            at most so many, and a run that is stopped (SIGTERM, Ctrl-C) costs none, so this need
            not be often: a save of a large run takes minutes.
        keep_last: how many of the newest checkpoints stay; the one before the newest is for a disk
            that damages files.
        keep_every: also keep every checkpoint whose iteration is a multiple of this.
        keep_best: also keep those that were best by a metric.
        resume: ``latest`` (the default: newest intact checkpoint of the output folder; afresh if it
            has none), ``none``, or the path of one checkpoint folder.
        changes: what this run has more or less than the checkpoint that it resumes.
        save_at_end: save when the run is complete. A run that is asked to stop always saves.
        async_save: copy what is to be saved, and write it while training goes on. Costs host
            memory for one copy of it.
        timeout_seconds: how long a rank waits for the others in a save or resume.
        export: roles to export when the run is complete.
    """

    every_steps: int | None = field(default=500, validator=_at_least_one)
    keep_last: int = field(default=2)
    keep_every: int | None = field(default=None, validator=_at_least_one)
    keep_best: KeepBestConfig | None = field(default=None)
    resume: str = field(default="latest", metadata={"path": ("latest", "none")})
    changes: ChangesConfig = field(factory=ChangesConfig)
    save_at_end: bool = True
    async_save: bool = False
    timeout_seconds: float = field(default=1800.0)
    export: tuple[ExportConfig, ...] = field(default=())

    @timeout_seconds.validator
    def _check_timeout(self, attribute: object, value: float) -> None:
        if not value > 0:
            raise ValueError(
                f"{value:g} must be above 0: the others would be given up at once; 1800 is the "
                "default"
            )

    @keep_best.validator
    def _check_keep_best(self, attribute: object, value: KeepBestConfig | None) -> None:
        if value is not None and self.every_steps is None:
            raise ValueError(
                f"the best by {value.metric!r} has no effect without every_steps, because only the "
                "end is saved; set every_steps, or leave keep_best out"
            )

    @keep_last.validator
    def _check_keep_last(self, attribute: object, value: int) -> None:
        if value < 1:
            raise ValueError(
                f"{value} must be at least 1: without the newest checkpoint there is nothing to "
                "resume from"
            )

    @keep_every.validator
    def _check_keep_every(self, attribute: object, value: int | None) -> None:
        if value is None or value < 1:
            return
        if self.every_steps is None:
            raise ValueError(
                f"{value} has no effect without every_steps, because only the end is saved; "
                "set every_steps, or leave keep_every out"
            )
        if self.every_steps > 0 and value % self.every_steps:
            raise ValueError(
                f"{value} must be a multiple of every_steps ({self.every_steps}): other "
                "iterations are never saved, so they cannot be kept"
            )

    @resume.validator
    def _check_resume(self, attribute: object, value: str) -> None:
        if value not in ("latest", "none") and not os.path.isabs(value):
            raise ValueError(
                f"{value!r} must be 'latest', 'none' or the absolute path of a checkpoint folder "
                "such as /runs/a/checkpoint-000400"
            )

    @export.validator
    def _check_export(self, attribute: object, value: tuple[ExportConfig, ...]) -> None:
        folders = [PurePosixPath(export.folder) for export in value]
        twice = sorted({str(folder) for folder in folders if folders.count(folder) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)} is the folder of two exports, so one would overwrite the "
                "other; give each its own"
            )
        for folder in folders:
            for inner in folders:
                if folder in inner.parents:
                    raise ValueError(
                        f"'{inner}' lies inside '{folder}', which is the folder of another export: "
                        "an export takes the place of its whole folder, so the one would delete "
                        "the other. Put them beside each other"
                    )
