"""A latent data set as its files' names, sizes and shapes tell it. No torch, no tensor is read.

::

    index.json                   DatasetIndex; written last, so that it vouches for the rest
    shard-00000.safetensors      latents [N, C, T, H, W], raw posterior means;
                                 conditions.<name> [P, ...], the shard's distinct conditions;
                                 condition_id [N] int64, rows of those tables;
                                 trajectory [N, K, C, T, H, W] (optional), normalised: what the
                                 sampling of the latents was at each of ``trajectory_times``
    constants.safetensors        negative.<name> [1, ...] (optional)

What is no tensor is one JSON value under ``distill`` in a file's safetensors metadata (one,
because safetensors writes several in random order and equal data should give equal bytes): a
shard's ``{"ids", "captions"}``, the constants' ``{"negative_prompt", "encoder"}``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen
from distill_protocols import DataError

FORMAT = "distill-latents"
VERSION = 1
INDEX_FILE = "index.json"
CONSTANTS_FILE = "constants.safetensors"
METADATA_KEY = "distill"

REBUILD = "Preprocess the clips again, or copy the data set anew from where it was whole."


@frozen(kw_only=True)
class ShardEntry:
    """One shard: its file name, samples, size in bytes and SHA-256 in hex."""

    file: str
    samples: int
    bytes: int
    sha256: str


@frozen(kw_only=True)
class DatasetIndex:
    """What ``index.json`` says.

    Attributes:
        latent_shape: (C, T, H, W) of every sample.
        latent_dtype: as stored, a torch dtype's name; the loader gives fp32.
        conditions: shape of one row of each condition tensor, ``{"text": (L, D)}``.
        encoder: fingerprint of what encoded the captions, None if unknown.
        samples: in all shards together.
        shards: in the order of the samples.
        constants: file of the negative condition, None if there is none.
        trajectory_times: levels t of the trajectories, falling; empty if there are none.
    """

    latent_shape: tuple[int, int, int, int]
    latent_dtype: str
    conditions: Mapping[str, tuple[int, ...]]
    encoder: str | None
    samples: int
    shards: tuple[ShardEntry, ...]
    constants: str | None
    trajectory_times: tuple[float, ...] = ()

    def to_json(self) -> str:
        """The text of ``index.json``."""
        values = {"format": FORMAT, "version": VERSION, **attrs.asdict(self)}
        if not self.trajectory_times:
            del values["trajectory_times"]  # as release 1.0.0 wrote it
        return json.dumps(values, indent=1) + "\n"


def shard_file(number: int) -> str:
    """Name of a shard."""
    return f"shard-{number:05d}.safetensors"


SAME_TIME = 0.1
"""Levels t that are no further apart are one: x_t then differs by 1e-4 of v at most, which is less
than float16 rounds it by."""


def places_of(times: Iterable[float], stored: Sequence[float]) -> tuple[int, ...]:
    """Where each of ``times`` is among ``stored``.

    Raises:
        DataError: one is not there.
    """
    found = []
    for time in times:
        nearest = min(range(len(stored)), key=lambda i: abs(stored[i] - time), default=None)
        if nearest is None or abs(stored[nearest] - time) > SAME_TIME:
            said = ", ".join(f"{t:g}" for t in stored) or "none"
            raise DataError(f"there is no level t = {time:g} among those stored ({said})")
        found.append(nearest)
    return tuple(found)


def read_index(folder: Path) -> DatasetIndex:
    """The index of the data set in ``folder``.

    Raises:
        DataError: no folder, no index, another format or version, or it does not parse.
    """
    path = folder / INDEX_FILE
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder. data.path must name a latent data set.")
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{folder}: holds no {INDEX_FILE}, which is written last, so this is no latent data "
            "set or one whose preprocessing was interrupted. Preprocess the clips into a new "
            "folder, or name another one in data.path."
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}). {REBUILD}") from error
    return _parse(path, values)


def _parse(path: Path, values: Any) -> DatasetIndex:
    found = (values.get("format"), values.get("version")) if isinstance(values, dict) else None
    if found != (FORMAT, VERSION):
        raise DataError(
            f"{path}: format and version are {found}, but this release reads {FORMAT!r} version "
            f"{VERSION} only. {REBUILD}"
        )
    try:
        index = DatasetIndex(
            latent_shape=tuple(map(int, values["latent_shape"])),  # type: ignore[arg-type]
            latent_dtype=str(values["latent_dtype"]),
            conditions={k: tuple(map(int, v)) for k, v in values["conditions"].items()},
            encoder=values["encoder"],
            samples=int(values["samples"]),
            shards=tuple(ShardEntry(**shard) for shard in values["shards"]),
            constants=values["constants"],
            trajectory_times=tuple(map(float, values.get("trajectory_times", ()))),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: a field is missing or of the wrong type ({error!r}). {REBUILD}"
        ) from error
    if index.samples < 1 or index.samples != sum(shard.samples for shard in index.shards):
        raise DataError(
            f"{path}: says {index.samples} samples, but its shards hold "
            f"{sum(shard.samples for shard in index.shards)}; the sum must be the same and at "
            f"least 1, because a sample is found by counting. {REBUILD}"
        )
    return index


def read_metadata(file: Path) -> dict[str, Any]:
    """The JSON value under ``distill`` in the header of a safetensors file.

    Raises:
        DataError: not a safetensors file, or one without that value.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            # The file's own size bounds the read: 8 bytes of a file of another kind are any number.
            size = file.stat().st_size
            if length > size:
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        if size != 8 + length + max(ends, default=0):
            raise ValueError("header that does not describe the bytes after it")
        return json.loads(header["__metadata__"][METADATA_KEY])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise DataError(
            f"{file}: not a safetensors file of this framework ({error!r}); nothing else is read, "
            f"because other formats can run code. {REBUILD}"
        ) from error
