"""Headers of safetensors files, read without trust. No torch here."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from distill_runtime.files import open_file
from distill_runtime.json_files import UnreadableFileError, as_count, as_text, parse_json

_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Size of one number of each type, by the format's own names."""

_MAX_HEADER = 100_000_000
"""Bytes; the limit of safetensors' own reader."""
_MAX_DIMENSIONS = 64
"""Of a tensor; torch has no more."""


@frozen(kw_only=True)
class SafetensorsHeader:
    """The header of a safetensors file.

    Attributes:
        tensors: by name, (dtype as the format calls it, shape, first byte, byte after the last),
            counted from the first tensor.
        metadata: texts by name.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]
    metadata: Mapping[str, str]


def read_header(file: Path) -> SafetensorsHeader:
    """Return the header of ``file``, if the file is as long as it states and its tensors fill it
    without gaps or overlaps, as the format demands. No tensor is read.

    Raises:
        UnreadableFileError: missing, cut short, or no safetensors file.
    """
    text, size = _header_text(file)
    value = parse_json(text, f"the header of {file}")
    try:
        metadata = value.pop("__metadata__", {})
        header = SafetensorsHeader(
            tensors={name: _entry(name, entry) for name, entry in value.items()},
            metadata={key: as_text(text) for key, text in metadata.items()},
        )
        end = _end_of_tensors(header)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UnreadableFileError(
            f"{file} has a damaged safetensors header ({type(error).__name__}: {error})"
        ) from error
    expected = 8 + len(text) + end
    if size != expected:
        raise UnreadableFileError(
            f"{file} has {size} bytes where its header states {expected}: it was cut short or "
            "overwritten"
        )
    return header


def _header_text(file: Path) -> tuple[bytes, int]:
    """Return the bytes of the header, and the size of the whole file."""
    try:
        with open_file(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            # The file's own size bounds the read: 8 bytes of another kind of file are any number.
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise UnreadableFileError(
                    f"{file} is no whole safetensors file ({size} bytes): cut short, or a "
                    "Git LFS pointer"
                )
            return stream.read(length), size
    except OSError as error:
        raise UnreadableFileError(f"{file} cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a NUL in the name
        raise UnreadableFileError(f"{str(file)!r} is no file name ({error})") from error


def _entry(name: str, entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    begin, end = (as_count(offset) for offset in entry["data_offsets"])
    shape = tuple(as_count(n) for n in entry["shape"])
    dtype = as_text(entry["dtype"])
    if begin > end or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{name!a}: it ends before it begins, or has too many dimensions")
    size = _BYTES.get(dtype)
    if size is not None and math.prod(shape) * size != end - begin:
        raise ValueError(f"{name!a}: its shape is not as long as its bytes")
    return dtype, shape, begin, end


def _end_of_tensors(header: SafetensorsHeader) -> int:
    """Return the byte after the last tensor, all being one after the other."""
    last = 0
    for begin, end, name in sorted((b, e, n) for n, (_, _, b, e) in header.tensors.items()):
        if begin != last:
            raise ValueError(f"{name!a}: begins at byte {begin}, and the one before ends at {last}")
        last = end
    return last
