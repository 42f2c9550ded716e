"""What a run needs and this machine does not have yet, and which command makes it. No torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from attrs import frozen
from distill_conditioning.config import DataConfig

from distill_runfile.draft import Draft
from distill_runfile.paths import resolve_path
from distill_runfile.problems import KeyPath
from distill_runfile.schema import is_local
from distill_runfile.source import read_source

_WRITERS = {"training": "train", "trajectories": "trajectories", "preprocess": "preprocess"}
"""Sections that have an ``output_dir``, and the app of each."""
_MOST_FILES = 200


@frozen
class Writer:
    """A run file that writes a path, and the app that it is for."""

    file: Path
    app: str


def missing_parts(draft: Draft, *, made_before: Collection[str] = ()) -> Iterator[str]:
    """Yield what of a file's data and starts is not there, each with the command that makes it.

    Args:
        made_before: starts that a run before this one makes (``chain``).
    """
    beside = draft.document.main.file
    for path in missing_data(draft.data) if draft.data is not None else ():
        yield f"the data set {path}{made_by(path, beside)}"
    held_out = draft.validation.data if draft.validation is not None else None
    if held_out is not None and not Path(held_out.path).exists():
        yield f"the held-out data set {held_out.path}{made_by(held_out.path, beside)}"
    for name, role in draft.roles.items():
        start = role.init_from
        if start is not None and start.path not in made_before and is_missing(start.path):
            yield f"the start of {name}, {start.path}{made_by(start.path, beside)}"


def missing_data(data: DataConfig) -> tuple[str, ...]:
    """Return the folders of data sets that are not there."""
    return tuple(one.path for one in data.all_sets if not Path(one.path).exists())


def data_key(data: DataConfig, path: str) -> KeyPath:
    """Return where the data set of a folder is named."""
    if data.path is not None:
        return ("data", "path")
    return ("data", "sets", str([one.path for one in data.sets].index(path)), "path")


def is_missing(path: str) -> bool:
    """Return whether ``path`` is a folder, rather than a hub id, and not there."""
    return is_local(path) and not Path(path).exists()


def made_by(path: str, beside: Path) -> str:
    """Say which command makes ``path``, as the end of a sentence; empty where none does."""
    writer = find_writer(path, beside)
    if writer is None:
        return ""
    return f" (which `uv run apps/{writer.app} --config {os.path.relpath(writer.file)}` makes)"


def find_writer(path: str, beside: Path) -> Writer | None:
    """Find the run file in the folder of ``beside`` that writes ``path``, if one does."""
    for file in sorted(beside.resolve().parent.glob("*.yaml"))[:_MOST_FILES]:
        if app := _writer_of(path, file):
            return Writer(file, app)
    return None


def _writer_of(path: str, file: Path) -> str | None:
    values = read_source(file).values or {}
    for section, app in _WRITERS.items():
        written = values.get(section)
        output_dir = written.get("output_dir") if isinstance(written, dict) else None
        if not isinstance(output_dir, str) or not output_dir.strip():
            continue
        try:
            folder = Path(resolve_path(output_dir, file.parent))
        except ValueError:
            continue
        if folder == Path(path) or folder in Path(path).parents:
            return app
    return None
