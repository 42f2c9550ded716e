"""One safetensors file: written whole or not at all, read memory-mapped, refused with its name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from distill_protocols import DataError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill_conditioning.index import METADATA_KEY, REBUILD, read_metadata


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes it at the end, or vanishes on an error."""
    # Several ranks, perhaps on several hosts, may write the same cache entry at once.
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield part
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write ``tensors`` with ``metadata`` (JSON) as a safetensors file, whole or not at all."""
    with written_whole(path) as part:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            part,
            metadata={METADATA_KEY: json.dumps(dict(metadata))},
        )


def map_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file, memory-mapped (a page is read when it is touched), and its metadata.

    Raises:
        DataError: missing, truncated, or not a safetensors file.
    """
    metadata = read_metadata(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: not a whole safetensors file ({error}); it was truncated or overwritten. "
            f"{REBUILD}"
        ) from error


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
