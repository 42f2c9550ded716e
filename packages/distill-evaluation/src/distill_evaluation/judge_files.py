"""A judge's folder, as far as it can be read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from distill_runtime import UnreadableFileError, read_json_object

from distill_evaluation.labels import Attributes, read_words

SETTINGS = "judge.json"
WEIGHTS = "judge.safetensors"
REFERENCE = "reference.safetensors"


def judge_problem(folder: Path) -> str | None:
    """Say why ``folder`` is no judge's; None: it is one, as far as its settings tell."""
    names = (SETTINGS, WEIGHTS, REFERENCE)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        return f"{folder} holds no {', '.join(missing)}; a judge's folder holds all three"
    try:
        read_attributes(folder)
    except UnreadableFileError as error:
        return f"{folder / SETTINGS} does not describe a judge ({error})"
    return None


def read_attributes(folder: Path) -> Attributes:
    """Read the judge's attributes and their classes.

    Raises:
        UnreadableFileError: its settings cannot be read, or are no judge's.
    """
    try:
        attributes = cast(Mapping[str, object], read_json_object(folder / SETTINGS)["attributes"])
        return {name: read_words(name, classes) for name, classes in attributes.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnreadableFileError(f"{folder / SETTINGS}: its attributes: {error}") from error
