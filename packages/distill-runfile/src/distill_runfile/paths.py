"""Paths as files write them. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from distill_runtime import path_problem

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


def resolve_path(value: str, base: Path, *, keep: tuple[str, ...] = ()) -> str:
    """Return ``value`` as an absolute path from ``base``; words in ``keep`` stay as they are.

    Raises:
        ValueError: it can be no path (``written_path_problem``).
    """
    if value in keep or not value.strip():
        return value  # an empty string is no folder: the field's own rule refuses it
    if problem := written_path_problem(value):
        raise ValueError(problem)
    return str((base / Path(value).expanduser()).resolve())


def written_path_problem(value: str) -> str | None:
    """Say why ``value``, as it is written in a file, can be no path; None: it can."""
    if variable := _VARIABLE.search(value):
        return (
            f"{value!r} holds {variable[0]}, and nothing is expanded in a run file, so that it "
            "means the same wherever it is read. Write the path itself, or one relative to the "
            "file, or make the file from a template"
        )
    return path_problem(value)
