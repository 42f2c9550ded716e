"""The format of a latent data set: its files, and what its index states. No torch here.

::

    index.json                   DatasetIndex; written last, so that it vouches for the rest
    shard-00000.safetensors      latents [N, C, T, H, W], raw posterior means; none in a data set
                                 of captions alone;
                                 latents.<name> [N, C, T, H, W] of further parts (optional), such as
                                 the sound of clips with ``parts`` in their shape;
                                 conditions.<name> [P, L, ...], the shard's distinct conditions, or
                                 [sum of lengths, ...] without the zero rows at the end of each;
                                 lengths.<name> [P] int64, of those that were cut so;
                                 condition_id [N] int64, rows of those tables, or [N, K] where
                                 samples have up to K captions, -1 for those that one has less;
                                 trajectory [N, K, C, T, H, W] (optional), normalised: the states
                                 of the teacher's sampling at each of ``trajectory_times``
    constants.safetensors        negative.<name> [1, ...] (optional);
                                 negatives.<name> [N, ...] of further negative prompts (optional)

All samples of a shard have one ``SampleShape``; shards may differ.

What is no tensor is one JSON object under ``distill`` in a file's safetensors metadata (one,
because safetensors writes several in random order and equal data shall give equal bytes): a
shard's ``{"ids", "captions", "rows"}`` (``rows``: shape of a whole row of each condition), the
constants' ``{"negative_prompt", "more_negative_prompts", "encoder"}`` (``encoder`` is not read any
more: what computed them is in the index).

**Version 1** has one shape in the whole data set (``latent_shape`` and ``conditions`` of the
index), whole rows of conditions and no ``rows``, and one caption a sample. It is read as before.
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
VERSION = 2
"""That is written; ``OLD_VERSION`` is read, too."""
OLD_VERSION = 1
INDEX_FILE = "index.json"
CONSTANTS_FILE = "constants.safetensors"
METADATA_KEY = "distill"

PART = "latents."
"""Begins the names of a shard's tensors of further parts of latents."""
CONDITION = "conditions."
"""Begins the names of a shard's condition tensors."""
LENGTHS = "lengths."
"""Begins the names of the lengths of those that are stored without the zeros at their ends."""
NEGATIVE = "negative."
"""Begins the names of the tensors of the negative condition."""
MORE_NEGATIVES = "negatives."
"""Begins the names of those of further ones, a row each, in the order of their prompts."""
TRAJECTORY = "trajectory"

_MAX_SIZE = 1 << 24
"""Of latents along an axis."""
_MAX_ROW = 1 << 17
"""Of a row of a condition along an axis: more than the tokens of any prompt."""

_MORE_PROMPTS = "more_negative_prompts"

REBUILD = "Preprocess the clips again, or copy the data set anew from where it was whole."

LatentSize = tuple[int, int, int, int]
"""(C, T, H, W)."""


@frozen(kw_only=True)
class SampleShape:
    """Shapes of one sample. Samples that share them can be batched.

    Attributes:
        latents: (C, T, H, W); None: there are captions alone.
        conditions: of one row of each condition tensor, ``{"text": (L, D)}``.
        parts: of each part of latents by name, where they are several; the first is ``latents``.
    """

    latents: LatentSize | None
    conditions: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, LatentSize] = MappingProxyType({})

    def __str__(self) -> str:
        latents = "captions alone" if self.latents is None else f"latents {list(self.latents)}"
        if self.parts:
            latents = ", ".join(f"{name} {list(shape)}" for name, shape in self.parts.items())
        rows = ", ".join(f"{name} {list(shape)}" for name, shape in self.conditions.items())
        return f"{latents}, conditions {rows or 'none'}"


@frozen(kw_only=True)
class ShardEntry:
    """One shard: its file name, samples, size in bytes, SHA-256 in hex, and its samples' shape."""

    file: str
    samples: int
    bytes: int
    sha256: str
    shape: SampleShape


@frozen(kw_only=True)
class DatasetIndex:
    """The content of ``index.json``.

    Attributes:
        latent_dtype: as stored, a torch dtype's name; the loader gives fp32.
        encoder: one hash of all that encoded the captions, None if unknown. Releases before named
            entries wrote and compared nothing else.
        samples: in all shards together.
        shards: in the order of the samples.
        constants: file of the negative condition, None if there is none.
        trajectory_times: levels t of the trajectories, falling; empty if there are none.
        fingerprint: what computed latents and conditions, as named entries; empty in data sets of
            earlier releases.
        version: of the format.
    """

    latent_dtype: str
    encoder: str | None
    samples: int
    shards: tuple[ShardEntry, ...]
    constants: str | None
    trajectory_times: tuple[float, ...] = ()
    fingerprint: Fingerprint = MappingProxyType({})
    version: int = VERSION

    @property
    def shapes(self) -> tuple[SampleShape, ...]:
        """The different shapes of samples, in the order in which the shards begin with them."""
        shapes: list[SampleShape] = []
        for shard in self.shards:
            if shard.shape not in shapes:
                shapes.append(shard.shape)
        return tuple(shapes)

    @property
    def has_latents(self) -> bool:
        """Whether the samples have latents; without, they are captions alone."""
        return all(shape.latents is not None for shape in self.shapes)

    @property
    def bytes_per_sample(self) -> float:
        """Mean size of a sample on the disk, its conditions included."""
        return sum(shard.bytes for shard in self.shards) / self.samples

    @property
    def computed_by(self) -> dict[str, str]:
        """All that is recorded of what computed the data set."""
        whole = {} if self.encoder is None else {WHOLE_ENCODER: self.encoder}
        return {**self.fingerprint, **whole}

    def to_json(self) -> str:
        """Return the text of ``index.json``, in the version that the index is of."""
        plain = [
            {"file": s.file, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256}
            for s in self.shards
        ]
        head = {"format": FORMAT, "version": self.version}
        dtype, shapes = {"latent_dtype": self.latent_dtype}, self.shapes
        rest = {"encoder": self.encoder, "samples": self.samples}
        if self.version == OLD_VERSION:
            [shape] = shapes
            latents = {"latent_shape": shape.latents}
            values = {**head, **latents, **dtype, "conditions": shape.conditions, **rest}
        else:
            values = {**head, **dtype, "shapes": [_as_json(shape) for shape in shapes], **rest}
            for shard, entry in zip(self.shards, plain, strict=True):
                entry["shape"] = shapes.index(shard.shape)
        values |= {"shards": plain, "constants": self.constants}
        optional = {
            "trajectory_times": self.trajectory_times,
            "fingerprint": dict(sorted(self.fingerprint.items())),
        }
        values |= {name: value for name, value in optional.items() if value}
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
    if stated not in ((FORMAT, VERSION), (FORMAT, OLD_VERSION)):
        raise DataError(
            f"{path}: format and version are {stated}, but this release reads {FORMAT!r} of the "
            f"versions {OLD_VERSION} and {VERSION} only. {REBUILD}"
        )
    try:
        constants = values["constants"]
        shapes = _shapes(values)
        index = DatasetIndex(
            latent_dtype=as_text(values["latent_dtype"]),
            encoder=None if values["encoder"] is None else as_text(values["encoder"]),
            samples=as_count(values["samples"]),
            shards=tuple(_shard_entry(path, shapes, **shard) for shard in values["shards"]),
            constants=None if constants is None else _file_name(path, constants),
            trajectory_times=tuple(map(_time, values.get("trajectory_times", ()))),
            fingerprint={as_text(k): as_text(v) for k, v in values.get("fingerprint", {}).items()},
            version=values["version"],
        )
    except (LookupError, TypeError, ValueError, AttributeError, UnreadableFileError) as error:
        raise DataError(
            f"{path}: a field is missing or of the wrong type ({error!r}). {REBUILD}"
        ) from error
    if index.samples < 1 or index.samples != sum(shard.samples for shard in index.shards):
        raise DataError(
            f"{path}: states {index.samples} samples, but its shards hold "
            f"{sum(shard.samples for shard in index.shards)}; the sum must be the same and at "
            f"least 1, because a sample is found by counting. {REBUILD}"
        )
    _check_shapes(path, index)
    return index


def _check_shapes(path: Path, index: DatasetIndex) -> None:
    """Raises: samples with and without latents, or with conditions of other names."""
    kinds = {(shape.latents is None, frozenset(shape.conditions)) for shape in index.shapes}
    by_latents = {shape.latents for shape in index.shapes}
    if len(kinds) > 1 or len(by_latents) < len(index.shapes):
        listed = "; ".join(map(str, index.shapes))
        raise DataError(
            f"{path}: its samples have the shapes {listed}; all must have latents or none, the "
            f"same conditions, and those of one latent shape the same shapes. {REBUILD}"
        )


def _shapes(values: Mapping[str, Any]) -> list[SampleShape]:
    if values["version"] == OLD_VERSION:
        return [_shape(latents=values["latent_shape"], conditions=values["conditions"])]
    return [_shape(**shape) for shape in values["shapes"]]


def _as_json(shape: SampleShape) -> dict[str, object]:
    # Without parts it is as before there were any: equal data give equal bytes.
    values = attrs.asdict(shape)
    return values if shape.parts else {k: v for k, v in values.items() if k != "parts"}


def _shape(*, latents: Any, conditions: Any, parts: Any = MappingProxyType({})) -> SampleShape:
    shape = SampleShape(
        latents=None if latents is None else _latent_shape(latents),
        conditions=row_shapes(conditions),
        parts={as_text(name): _latent_shape(size) for name, size in parts.items()},
    )
    if shape.parts and next(iter(shape.parts.values())) != shape.latents:
        raise ValueError("the first of several parts is the latents")
    return shape


def part_tensor(name: str, shape: SampleShape) -> str:
    """Return the name of the tensor that a shard holds a part of latents in."""
    return "latents" if name == next(iter(shape.parts)) else f"{PART}{name}"


def row_shapes(value: Any) -> dict[str, tuple[int, ...]]:
    """Read the shapes of rows by name, which came from a file.

    Raises:
        AttributeError, TypeError, ValueError: they are anything else.
    """
    return {
        as_text(name): tuple(as_count(size, most=_MAX_ROW) for size in shape)
        for name, shape in value.items()
    }


def _latent_shape(value: Iterable[object]) -> tuple[int, int, int, int]:
    channels, frames, height, width = (as_count(size, least=1, most=_MAX_SIZE) for size in value)
    return channels, frames, height, width


def _shard_entry(
    path: Path,
    shapes: Sequence[SampleShape],
    *,
    file: Any,
    samples: Any,
    bytes: Any,
    sha256: Any,
    shape: Any = 0,
) -> ShardEntry:
    return ShardEntry(
        file=_file_name(path, file),
        samples=as_count(samples),
        bytes=as_count(bytes),
        sha256=as_text(sha256),
        shape=shapes[as_count(shape)],
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


def read_more_negative_prompts(file: Path, metadata: Mapping[str, object]) -> list[str]:
    """Take the further negative prompts from the metadata of the constants in ``file``.

    Raises:
        DataError: they are no list of texts.
    """
    return read_texts(file, metadata, _MORE_PROMPTS) if _MORE_PROMPTS in metadata else []


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


def read_shape(file: Path) -> SampleShape:
    """Read the shape of a shard's samples from its header.

    Raises:
        DataError: not a whole safetensors file, or its metadata is damaged.
    """
    metadata = read_metadata(file)
    shapes = {name: shape for name, (_, shape, _, _) in read_header(file).tensors.items()}
    try:
        rows = row_shapes(metadata["rows"]) if "rows" in metadata else {}
        for name, shape in shapes.items():
            if name.startswith(CONDITION):
                rows.setdefault(name.removeprefix(CONDITION), shape[1:])
        latents = shapes.get("latents")
        stored = metadata.get("parts", [])
        parts = [as_text(name) for name in stored] if isinstance(stored, list) else []
        sizes = [shapes["latents" if i == 0 else PART + n][1:] for i, n in enumerate(parts)]
        return _shape(
            latents=None if latents is None else latents[1:],
            conditions=rows,
            parts=dict(zip(parts, sizes, strict=True)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file}: the shapes in its header are damaged ({error!r}). {REBUILD}"
        ) from error
