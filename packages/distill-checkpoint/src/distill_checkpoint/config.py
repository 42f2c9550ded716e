"""The run file's ``checkpoint`` section. No torch here: run files are checked without it."""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import Any

from attrs import field, frozen

_RESERVED = frozenset(
    {
        "run.json", "metrics.jsonl", "tensorboard", "wandb", "validation", "cache", "profile",
        "debug", "report.json", "contact_sheet.png", "clips.mp4",
    }
)  # fmt: skip
"""Names in an output folder that a run, its trackers and callbacks write themselves."""


def _at_least_one(instance: Any, attribute: Any, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(
            f"{value} must be at least 1: it counts. Leave {attribute.name} out for its default."
        )


@frozen(kw_only=True)
class ExportConfig:
    """One role to write as a pipeline folder when the run is complete.

    Attributes:
        role: a role under ``models``.
        folder: where to write it, relative to the output folder, e.g. ``export/student``.
        ema: export the role's EMA weights instead of the live ones.
    """

    role: str = field()
    folder: str = field()
    ema: bool = False

    @role.validator
    def _check_role(self, attribute: object, value: str) -> None:
        if not value:
            raise ValueError("an export must name its role; name one that stands under `models:`")

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
        if path.parts[0] in _RESERVED:
            raise ValueError(
                f"{value!r} must not begin with {path.parts[0]!r}: the run itself writes that into "
                "the output folder, and one would overwrite the other; for example 'export/student'"
            )


@frozen(kw_only=True)
class CheckpointConfig:
    """When to save, what to keep, where to resume from, what to export at the end.

    Attributes:
        every_steps: save after every so many iterations; null saves only at the end.
        keep_last: how many of the newest checkpoints stay.
        keep_every: also keep every checkpoint whose iteration is a multiple of this.
        resume: ``latest`` (newest whole checkpoint of the output folder; afresh if it has none),
            ``none``, or the path of one checkpoint folder.
        save_at_end: save when the run is complete. A run that is asked to stop always saves.
        export: roles to export when the run is complete.
    """

    every_steps: int | None = field(default=None, validator=_at_least_one)
    keep_last: int = field(default=2)
    keep_every: int | None = field(default=None, validator=_at_least_one)
    resume: str = field(default="none", metadata={"path": ("latest", "none")})
    save_at_end: bool = True
    export: tuple[ExportConfig, ...] = field(default=())

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
