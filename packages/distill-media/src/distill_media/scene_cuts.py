"""The list of scene cuts that another tool has found."""

from __future__ import annotations

import math
from pathlib import Path

from distill_protocols import DataError
from distill_runtime import UnreadableFileError, read_json_object


def read_scene_cuts(file: Path) -> dict[str, tuple[float, ...]]:
    """Read {id: [seconds, ...]}.

    Raises:
        DataError: the file is missing, or holds anything else.
    """
    try:
        values = read_json_object(file)
        return {name: _seconds(value, name) for name, value in values.items()}
    except (UnreadableFileError, ValueError) as error:
        raise DataError(
            f"{error}. Scene cuts are a JSON object, {{id of a clip: [seconds, ...]}}: {file}"
        ) from error


def _seconds(value: object, name: str) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name!r} has no list of seconds")
    times = []
    for time in value:
        if type(time) not in (int, float) or not math.isfinite(time) or time < 0:
            raise ValueError(f"{name!r} has {time!r}, which is no time in seconds")
        times.append(float(time))
    return tuple(times)
