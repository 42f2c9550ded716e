"""What a folder was begun with: a process that goes on must make the same samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from distill_protocols import DataError
from distill_runtime import UnreadableFileError, read_json

from distill_conditioning.writing import write_new_text, write_text


def claim_settings(
    folder: Path,
    file_name: str,
    settings: Mapping[str, object],
    *,
    foreign: Iterable[str],
    replace: bool = False,
) -> None:
    """Write ``settings`` into a new folder, or compare them with those that it was begun with.

    Several processes may do so at once.

    Args:
        foreign: patterns of files which, without ``file_name`` beside them, are of something else.
        replace: nothing was made yet, so that other settings may take the place of the former.

    Raises:
        DataError: the folder holds something else, or was begun with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / file_name
    settings = json.loads(json.dumps(settings))  # as they will be read back
    text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    if file.exists() and replace:
        write_text(file, text)
        return
    if not file.exists():
        old = [found for pattern in foreign for found in folder.glob(pattern)]
        if old:
            raise DataError(
                f"{folder}: holds {old[-1].name}, but no {file_name}, so it is another data set, "
                "and shards of two could not be distinguished. Name a new folder."
            )
        if write_new_text(file, text):
            return  # else another process has begun this very moment
    _compare(folder, file, settings)


def _compare(folder: Path, file: Path, settings: Mapping[str, object]) -> None:
    try:
        stored = read_json(file)
    except UnreadableFileError as error:
        raise DataError(
            f"{error}, so the settings of the shards beside it are unknown. Name a new folder."
        ) from error
    then, now = _flatten(stored), _flatten(settings)
    differences = [
        f"{key} was {_json(then, key)} and is {_json(now, key)}"
        for key in dict.fromkeys([*then, *now])
        if _json(then, key) != _json(now, key)
    ]
    if differences:
        raise DataError(
            f"{folder}: was made with other settings: {'; '.join(differences)}. Samples of two "
            "settings in one data set could not be distinguished. Put them back as they were, or "
            "name a new folder."
        )


def _flatten(value: Any, path: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {path: value}
    return {
        key: item
        for name, inner in value.items()
        for key, item in _flatten(inner, f"{path}.{name}" if path else name).items()
    }


def _json(values: Mapping[str, object], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "not there"
