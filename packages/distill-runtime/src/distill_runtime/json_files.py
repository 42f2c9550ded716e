"""JSON files that may be damaged or hostile. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_protocols.errors import DistillError

MAX_BYTES = 256 << 20
"""Larger than any index or manifest that this framework or diffusers writes."""


class UnreadableFileError(DistillError):
    """A file is missing, damaged, or not what it should be. The message names the file and what is
    wrong with it; whoever reads it adds what it is for and the way out."""


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The JSON value in ``path``.

    Raises:
        UnreadableFileError: missing, too large, not UTF-8, no JSON, nested too deeply, or with
            numbers that Python cannot hold.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise UnreadableFileError(
                f"{path} has {size} bytes; more than {max_bytes} are not read"
            )
        text = path.read_bytes()
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a NUL in the name
        raise UnreadableFileError(f"{str(path)!r} is no file name ({error})") from error
    return parse_json(text, str(path))


def read_json_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        UnreadableFileError: as ``read_json``, or another value than an object.
    """
    value = read_json(path, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise UnreadableFileError(f"{path} holds {type(value).__name__}, and no JSON object")
    return value


def parse_json(text: bytes | str, where: str) -> Any:
    """The JSON value in ``text``, which came from ``where``.

    Raises:
        UnreadableFileError: as ``read_json``.
    """
    try:
        return json.loads(text)
    except RecursionError:
        # From None: a traceback of a thousand levels helps nobody.
        raise UnreadableFileError(f"{where} is nested too deeply to be read") from None
    except ValueError as error:
        raise UnreadableFileError(f"{where} is no JSON ({error})") from error


def json_text(value: Mapping[str, Any] | list[Any], *, indent: int | None = 2) -> str:
    """``value`` as a file holds it. inf and nan, which JSON does not have, are refused."""
    return json.dumps(value, indent=indent, allow_nan=False) + "\n"
