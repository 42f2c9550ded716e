"""JSON that may be damaged or hostile: limits are checked before anything is built. No torch here.

Python's own reader gives ``RecursionError`` for deep nesting, takes ``NaN`` and ``1e999``, keeps
the last of two equal keys, and turns a file of brackets into many times its size. A value that was
read here can be walked by recursive functions, written as JSON again and shown on a terminal.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from distill_protocols.errors import DistillError

from distill_runtime.files import open_file

MAX_BYTES = 256 << 20
"""Larger than any index or manifest that this framework or diffusers writes."""
MAX_DEPTH = 100
"""Of lists and objects in each other: ten times what any file needs, a tenth of what recursive
functions can walk."""
MAX_NODES = 8_000_000
"""Values and keys; a tokenizer of 262,000 words has 2 million."""
MAX_DIGITS = 40
"""Of an integer. Fits every number of 128 bits, and each is a finite float."""

_STRING = re.compile(r'"[^"\\]*+(?:\\(?s:.)[^"\\]*+)*+(?:"|\\?\Z)')
_NO_BRACKETS = re.compile(r"[^\[\]{}]+")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_LONG_NUMBER = re.compile(rf"[-+]?[0-9]{{{MAX_DIGITS + 1},}}")


class UnreadableFileError(DistillError):
    """A file is missing, damaged, or not what it should be. The message names the file and what is
    wrong with it; whoever reads it adds what it is for and the way out."""


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Return the JSON value in ``path``.

    Raises:
        UnreadableFileError: missing, no regular file, too large, or as ``parse_json``.
    """
    return parse_json(read_bytes(path, max_bytes=max_bytes), str(path))


def read_json_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, object]:
    """Return the JSON object in ``path``.

    Raises:
        UnreadableFileError: as ``read_json``, or another value than an object.
    """
    value = read_json(path, max_bytes=max_bytes)
    if not isinstance(value, dict):
        raise UnreadableFileError(f"{path} holds {_kind(value)}, and no JSON object")
    return value


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return all bytes of ``path``, which must be a regular file: a pipe would never end.

    Raises:
        UnreadableFileError: missing, no regular file, or too large.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise UnreadableFileError(
                    f"{path} has {size} bytes; more than {max_bytes} are not read"
                )
            return file.read()
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a NUL in the name
        raise UnreadableFileError(f"{str(path)!r} is no file name ({error})") from error


def parse_json(text: bytes | str, where: str) -> Any:
    """Return the JSON value in ``text``, which came from ``where``.

    Two equal keys are refused, as readers differ in which of them they take: what was checked
    could be another value than what is used.

    Raises:
        UnreadableFileError: not UTF-8, no JSON, nested too deeply, too many values, a key that
            stands twice, half of a UTF-16 pair, a number that is not finite or too long.
    """
    try:
        text = text if isinstance(text, str) else str(text, "utf-8")
        if text.startswith("\ufeff"):
            raise ValueError("it begins with a byte order mark; save it as plain UTF-8")
        refuse_excess(text)
        value = _DECODER.decode(text)
        if _SURROGATE_ESCAPE.search(text):
            _refuse_half_pairs(value)
    except RecursionError:
        # From None: a traceback of a thousand levels helps nobody.
        raise UnreadableFileError(f"{where} is nested too deeply to be read") from None
    except UnicodeDecodeError as error:
        raise UnreadableFileError(
            f"{where} is no UTF-8 text (byte {error.start}: {error.reason})"
        ) from error
    except json.JSONDecodeError as error:
        raise UnreadableFileError(f"{where} is no JSON ({error})") from error
    except ValueError as error:
        place = _place_of_long_number(text) if isinstance(text, str) else ""
        raise UnreadableFileError(f"{where} cannot be read: {error}{place}") from error
    return value


def refuse_excess(text: str) -> None:
    """Refuse JSON with more levels or values than are read, before any of them is built.

    Raises:
        ValueError: which limit it exceeds.
    """
    openings = text.count("[") + text.count("{")
    if openings <= MAX_DEPTH and openings + text.count(",") <= MAX_NODES:
        return  # also if none of these characters stands in a string
    skeleton = _STRING.sub("", text)
    openings = skeleton.count("[") + skeleton.count("{")
    if openings + skeleton.count(",") + skeleton.count(":") > MAX_NODES:
        raise ValueError(f"it holds more than {MAX_NODES:,} values")
    steps = (1 if bracket in "[{" else -1 for bracket in _NO_BRACKETS.sub("", skeleton))
    if max(accumulate(steps), default=0) > MAX_DEPTH:
        raise ValueError(f"it is nested too deeply (more than {MAX_DEPTH} levels)")


def parse_integer(digits: str) -> int:
    """Return an integer of at most ``MAX_DIGITS`` digits.

    Raises:
        ValueError: it is longer.
    """
    if len(digits.lstrip("+-")) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits; at most {MAX_DIGITS} are read")
    return int(digits)


def parse_float(digits: str) -> float:
    """Return a finite number; ``1e999`` is none.

    Raises:
        ValueError: it is too large to be held.
    """
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:MAX_DIGITS]} is larger than a float can be")
    return value


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which are no JSON.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{name} is no JSON number")


def as_count(value: object, *, least: int = 0, most: int = 2**63 - 1) -> int:
    """``value``, which came from a file, if it is an integer between ``least`` and ``most``.

    Raises:
        ValueError: it is anything else; true and 2.0 are.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{value!r} is no whole number from {least} to {most}")
    return value


def as_text(value: object) -> str:
    """``value``, which came from a file, if it is text.

    Raises:
        ValueError: it is anything else.
    """
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def json_text(value: Mapping[str, object] | Sequence[object], *, indent: int | None = 2) -> str:
    """``value`` as a file holds it. inf and nan, which JSON does not have, are refused."""
    return json.dumps(value, indent=indent, allow_nan=False) + "\n"


def flatten(
    value: Mapping[str, object], *, most: int = 5000, prefix: str = ""
) -> dict[str, object]:
    """Return nested mappings as one, under dotted keys; an empty one and all else are values.

    Args:
        most: keys; what comes after them is left out.
    """
    flat: dict[str, object] = {}
    for key, below in value.items():
        name = f"{prefix}{key}"
        if isinstance(below, Mapping) and below:
            flat |= flatten(below, most=most - len(flat), prefix=f"{name}.")
        else:
            flat[name] = below
        if len(flat) >= most:
            break
    return flat


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!a} stands twice in one object")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys,
    parse_int=parse_integer,
    parse_float=parse_float,
    parse_constant=refuse_constant,
)


def _refuse_half_pairs(value: object) -> None:
    """Refuse what no file and no terminal can show; whole pairs were joined by the decoder."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{half!a} is half of a UTF-16 pair, which is no text") from None


def _place_of_long_number(text: str) -> str:
    match = _LONG_NUMBER.search(text)
    return f" (line {text.count(chr(10), 0, match.start()) + 1})" if match else ""


def _kind(value: object) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
