"""Headers of safetensors files, read without trust. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from distill_runtime.json_files import UnreadableFileError, parse_json

_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Size of one number of each type, by the format's own names."""

_MAX_HEADER = 100_000_000
"""Bytes; the limit of safetensors' own reader."""


@frozen(kw_only=True)
class SafetensorsHeader:
    """What the beginning of a safetensors file says.

    Attributes:
        tensors: by name, (dtype as the format calls it, shape, first byte, byte after the last),
            counted from the first tensor.
        metadata: texts by name.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]
    metadata: Mapping[str, str]


def read_header(file: Path) -> SafetensorsHeader:
    """The header of ``file``, if the file is as long as it says. No tensor is read.

    Raises:
        UnreadableFileError: missing, cut short, or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            # The file's own size bounds the read: 8 bytes of another kind of file are any number.
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise UnreadableFileError(
                    f"{file} is no whole safetensors file ({size} bytes): cut short, or a Git LFS "
                    "pointer"
                )
            text = stream.read(length)
    except OSError as error:
        raise UnreadableFileError(f"{file} cannot be read ({error.strerror or error})") from error
    value = parse_json(text, f"the header of {file}")
    try:
        metadata = value.pop("__metadata__", {})
        header = SafetensorsHeader(
            tensors={name: _entry(entry) for name, entry in value.items()},
            metadata={str(key): str(text) for key, text in metadata.items()},
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UnreadableFileError(f"{file} has a damaged safetensors header") from error
    expected = 8 + length + max((end for *_, end in header.tensors.values()), default=0)
    if size != expected:
        raise UnreadableFileError(
            f"{file} has {size} bytes where its header says {expected}: it was cut short or "
            "overwritten"
        )
    return header


def _entry(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(n) for n in entry["shape"])
    if not 0 <= begin <= end or any(n < 0 for n in shape):
        raise ValueError("negative sizes")
    size = _BYTES.get(str(entry["dtype"]))
    if size is not None and math.prod(shape) * size != end - begin:
        raise ValueError("a shape that is not as long as its bytes")
    return str(entry["dtype"]), shape, begin, end
