"""The format of a latent data set: its files, and what its index says. No torch here.

::

    index.json                   DatasetIndex; written last, so that it vouches for the rest
    shard-00000.safetensors      latents [N, C, T, H, W], raw posterior means;
                                 conditions.<name> [P, ...], the shard's distinct conditions;
                                 condition_id [N] int64, rows of those tables;
                                 trajectory [N, K, C, T, H, W] (optional), normalised: the states
                                 of the teacher's sampling at each of ``trajectory_times``
    constants.safetensors        negative.<name> [1, ...] (optional)

What is no tensor is one JSON object under ``distill`` in a file's safetensors metadata (one,
because safetensors writes several in random order and equal data shall give equal bytes): a
shard's ``{"ids", "captions"}``, the constants' ``{"negative_prompt", "encoder"}`` (``encoder`` is
not read any more: what computed them is in the index).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict, cast

import attrs
from attrs import frozen
from distill_protocols import WHOLE_ENCODER, DataError, Fingerprint
from distill_runtime import (
    UnreadableFileError,
    as_count,
    as_text,
    parse_json,
    path_inside,
    read_header,
    read_json,
    sha256_of_file,
)

from distill_conditioning.fingerprints import without_whole_encoder

FORMAT = "distill-latents"
VERSION = 1
INDEX_FILE = "index.json"
CONSTANTS_FILE = "constants.safetensors"
METADATA_KEY = "distill"

CONDITION = "conditions."
"""Begins the names of a shard's condition tensors."""
NEGATIVE = "negative."
"""Begins the names of the tensors of the negative condition."""
TRAJECTORY = "trajectory"

_MAX_SIZE = 1 << 24
"""Of latents along an axis."""

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
    """The content of ``index.json``.

    Attributes:
        latent_shape: (C, T, H, W) of every sample.
        latent_dtype: as stored, a torch dtype's name; the loader gives fp32.
        conditions: shape of one row of each condition tensor, ``{"text": (L, D)}``.
        encoder: one hash of all that encoded the captions, None if unknown. Releases before named
            entries wrote and compared nothing else.
        samples: in all shards together.
        shards: in the order of the samples.
        constants: file of the negative condition, None if there is none.
        trajectory_times: levels t of the trajectories, falling; empty if there are none.
        fingerprint: what computed latents and conditions, as named entries; empty in data sets of
            earlier releases.
    """

    latent_shape: tuple[int, int, int, int]
    latent_dtype: str
    conditions: Mapping[str, tuple[int, ...]]
    encoder: str | None
    samples: int
    shards: tuple[ShardEntry, ...]
    constants: str | None
    trajectory_times: tuple[float, ...] = ()
    fingerprint: Fingerprint = MappingProxyType({})

    @property
    def computed_by(self) -> dict[str, str]:
        """All that is recorded of what computed the data set."""
        whole = {} if self.encoder is None else {WHOLE_ENCODER: self.encoder}
        return {**self.fingerprint, **whole}

    def to_json(self) -> str:
        """Return the text of ``index.json``."""
        values = {"format": FORMAT, "version": VERSION, **attrs.asdict(self)}
        if self.fingerprint:
            values["fingerprint"] = dict(sorted(self.fingerprint.items()))
        for name in ("trajectory_times", "fingerprint"):
            if not values[name]:
                del values[name]  # as earlier releases wrote it
        return json.dumps(values, indent=1) + "\n"


class RecordedFingerprint(TypedDict):
    """The entries of an index that say what computed the data set."""

    encoder: str | None
    fingerprint: Fingerprint


def split_fingerprint(fingerprint: Fingerprint) -> RecordedFingerprint:
    """Return ``encoder`` and ``fingerprint`` of an index from an adapter's fingerprint."""
    return {
        "encoder": fingerprint.get(WHOLE_ENCODER),
        "fingerprint": without_whole_encoder(fingerprint),
    }


def content_hash(folder: Path, index: DatasetIndex) -> str:
    """Hash what a run reads of a data set, from the checksums in its index.

    Only the constants, a few megabytes, are read. What the data set was computed by is no part of
    it: that may be recorded later.
    """
    digest = hashlib.sha256(index.latent_dtype.encode())
    for shard in index.shards:
        digest.update(f"{shard.samples} {shard.sha256}".encode())
    if index.constants is not None:
        digest.update(sha256_of_file(folder / index.constants).encode())
    return digest.hexdigest()


def position_problem(saved: Mapping[str, object], own: Mapping[str, object]) -> str | None:
    """Say why a loader's position in ``saved`` means nothing to a run; None: it does.

    Args:
        saved: ``LatentLoader.state_dict()`` of then; what an earlier release did not save is not
            compared.
        own: the same entries of the run.
    """
    texts = {
        "dataset_samples": "the data set had {} samples and has {}",
        "dataset": "the data set holds other samples (its checksum was {:.12} and is {:.12})",
        "seed": "the seed was {} and is {}",
        "shuffle": "shuffle was {} and is {}",
    }
    changed = [
        text.format(str(saved[key]), str(own[key]))
        for key, text in texts.items()
        if key in saved and saved[key] != own[key]
    ]
    if not changed:
        return None
    return (
        f"the data position of the checkpoint does not fit this run: {'; '.join(changed)}. They "
        "decide which samples are still to come, so the run could not go on where it stopped"
    )


def shard_file(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


SAME_TIME = 0.1
"""Levels t that are no further apart count as one: x_t then differs by 1e-4 of v at most, which is
less than float16 rounds it by."""


def find_levels(times: Iterable[float], stored: Sequence[float]) -> tuple[int, ...]:
    """Find the position of each of ``times`` among the ``stored`` levels.

    Raises:
        DataError: one is not stored.
    """
    positions = []
    for time in times:
        nearest = min(range(len(stored)), key=lambda i: abs(stored[i] - time), default=None)
        if nearest is None or abs(stored[nearest] - time) > SAME_TIME:
            levels = ", ".join(f"{t:g}" for t in stored) or "none"
            raise DataError(f"there is no level t = {time:g} among those stored ({levels})")
        positions.append(nearest)
    return tuple(positions)


def read_index(folder: Path) -> DatasetIndex:
    """Read the index of the data set in ``folder``.

    Raises:
        DataError: no folder, no index, another format or version, or it does not parse.
    """
    path = folder / INDEX_FILE
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; a latent data set is a folder.")
    if not path.exists():
        raise DataError(
            f"{folder}: holds no {INDEX_FILE}, which is written last, so this is no latent data "
            "set or one whose preprocessing was interrupted. Preprocess the clips into a new "
            "folder, or name another one."
        )
    try:
        values = read_json(path)
    except UnreadableFileError as error:
        raise DataError(f"{error}. {REBUILD}") from error
    return _parse_index(path, values)


def _parse_index(path: Path, values: Any) -> DatasetIndex:
    stated = (values.get("format"), values.get("version")) if isinstance(values, dict) else None
    if stated != (FORMAT, VERSION):
        raise DataError(
            f"{path}: format and version are {stated}, but this release reads {FORMAT!r} version "
            f"{VERSION} only. {REBUILD}"
        )
    try:
        constants = values["constants"]
        index = DatasetIndex(
            latent_shape=_latent_shape(values["latent_shape"]),
            latent_dtype=as_text(values["latent_dtype"]),
            conditions={k: tuple(map(as_count, v)) for k, v in values["conditions"].items()},
            encoder=None if values["encoder"] is None else as_text(values["encoder"]),
            samples=as_count(values["samples"]),
            shards=tuple(_shard_entry(path, **shard) for shard in values["shards"]),
            constants=None if constants is None else _file_name(path, constants),
            trajectory_times=tuple(map(_time, values.get("trajectory_times", ()))),
            fingerprint={as_text(k): as_text(v) for k, v in values.get("fingerprint", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, UnreadableFileError) as error:
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


def _latent_shape(value: Iterable[object]) -> tuple[int, int, int, int]:
    channels, frames, height, width = (as_count(size, least=1, most=_MAX_SIZE) for size in value)
    return channels, frames, height, width


def _shard_entry(path: Path, *, file: Any, samples: Any, bytes: Any, sha256: Any) -> ShardEntry:
    return ShardEntry(
        file=_file_name(path, file),
        samples=as_count(samples),
        bytes=as_count(bytes),
        sha256=as_text(sha256),
    )


def _file_name(path: Path, name: Any) -> str:
    return str(path_inside(path.parent, name, path).relative_to(path.parent))


def _time(value: object) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is no level t")
    return float(cast(float, value))


def read_texts(file: Path, metadata: Mapping[str, object], key: str) -> list[str]:
    """Take the texts under ``key`` from the metadata of ``file``.

    Raises:
        DataError: they are missing, or no list of texts.
    """
    texts = metadata.get(key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{file}: its metadata has no list of texts {key!r}. {REBUILD}")
    return texts


def read_negative_prompt(file: Path, metadata: Mapping[str, object]) -> str:
    """Take the negative prompt from the metadata of the constants in ``file``.

    Raises:
        DataError: it is missing, no text, or has an encoder that is none.
    """
    prompt, encoder = metadata.get("negative_prompt"), metadata.get("encoder")
    if not isinstance(prompt, str) or not isinstance(encoder, str | None):
        raise DataError(f"{file}: names no negative prompt. {REBUILD}")
    return prompt


def read_metadata(file: Path) -> dict[str, object]:
    """Read the JSON object under ``distill`` in the header of a safetensors file.

    Raises:
        DataError: not a whole safetensors file, or one without that object.
    """
    try:
        text = read_header(file).metadata.get(METADATA_KEY)
        value = None if text is None else parse_json(text, f"the metadata of {file}")
    except UnreadableFileError as error:
        raise DataError(
            f"{error}. Nothing but safetensors is read, because other formats can run code. "
            f"{REBUILD}"
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{file}: not a safetensors file of this framework; its metadata holds no object "
            f"{METADATA_KEY!r}. {REBUILD}"
        )
    return value
