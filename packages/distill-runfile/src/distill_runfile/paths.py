"""Paths as files write them. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from distill_protocols.validators import has_control_characters

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
_LONGEST_PART = 255
_LONGEST_PATH = 3500
"""Of 4,096 bytes, with room for the folder that it is relative to and for what is written in it."""


def resolve_path(value: str, base: Path, *, keep: tuple[str, ...] = ()) -> str:
    """Return ``value`` as an absolute path from ``base``; words in ``keep`` stay as they are.

    Raises:
        ValueError: it can be no path (``path_problem``).
    """
    if value in keep or not value.strip():
        return value  # an empty string is no folder: the field's own rule refuses it
    if problem := path_problem(value):
        raise ValueError(problem)
    return str((base / Path(value).expanduser()).resolve())


def path_problem(value: str) -> str | None:
    """Say why ``value``, a path as it is written in a file, can be none; None: it can."""
    if variable := _VARIABLE.search(value):
        return (
            f"{value!r} holds {variable[0]}, and nothing is expanded in a run file, so that it "
            "means the same wherever it is read. Write the path itself, or one relative to the "
            "file, or make the file from a template"
        )
    if has_control_characters(value):
        return f"{value!r} holds a control character, which no path should"
    parts = Path(value).parts
    if too_long := [part for part in parts if len(part.encode()) > _LONGEST_PART]:
        return (
            f"{value[:40]!r} ... holds {too_long[0][:20]!r} ..., a name of "
            f"{len(too_long[0].encode())} bytes; file systems take {_LONGEST_PART} at most"
        )
    if len(value.encode()) > _LONGEST_PATH:
        return f"{value[:40]!r} ... has {len(value.encode())} bytes, and paths end at 4096"
    try:
        Path(value).expanduser()
    except RuntimeError:
        return f"{value!r} begins with the home folder of a user that this machine does not know"
    return None
