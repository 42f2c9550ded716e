"""Reading a latent data set: samples by number, from memory-mapped shards.

The files are described in ``distill_conditioning.format``.
Letters: N samples of a shard, P distinct captions of it, B batch, C T H W as everywhere.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from distill_protocols import (
    Batch,
    Condition,
    ConditioningError,
    DataError,
    Fingerprint,
    LatentParts,
    Latents,
    LatentShape,
)
from distill_runtime import sha256_of_file
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill_conditioning.buckets import DataSource
from distill_conditioning.config import DataConfig
from distill_conditioning.dataset_info import data_info
from distill_conditioning.format import (
    CONDITION,
    LENGTHS,
    MORE_NEGATIVES,
    NEGATIVE,
    REBUILD,
    TRAJECTORY,
    SampleShape,
    ShardEntry,
    find_levels,
    part_tensor,
    read_metadata,
    read_more_negative_prompts,
    read_negative_prompt,
    read_shape,
    read_texts,
)


@frozen(eq=False, kw_only=True)
class StoredNegative:
    """The negative condition of a data set, with the prompt that it came from."""

    prompt: str
    condition: Condition


@frozen(eq=False, kw_only=True)
class _Table:
    """One condition tensor of a shard: row p is ``values[p]``, or, where ``ends`` is there, what
    ends at ``ends[p]`` of ``values``, with zeros after it."""

    values: Tensor
    shape: tuple[int, ...]
    ends: Tensor | None = None

    def row(self, number: int) -> Tensor:
        """Return a row as it is stored, without the zeros after it; a view."""
        if self.ends is None:
            return self.values[number]
        return self.values[int(self.ends[number - 1]) if number else 0 : int(self.ends[number])]


@frozen(kw_only=True)
class _File:
    """A shard of a data set, not opened yet; ``prefix`` begins the ids of its samples."""

    source: DataSource
    entry: ShardEntry
    prefix: str

    @property
    def path(self) -> Path:
        return self.source.path / self.entry.file


@frozen(eq=False, kw_only=True)
class _Shard:
    file: _File
    latents: Tensor | None
    parts: Mapping[str, Tensor]
    """Of ``latents`` that are several, those that are read."""
    conditions: Mapping[str, _Table]
    condition_id: NDArray[np.int64]
    """[N, K], -1 where a sample has less than K captions. Rows of numpy are found in a tenth of the
    time of torch's, and a batch of tiny clips asks for many."""
    ids: list[str]
    captions: list[str]
    trajectory: Tensor | None
    levels: Tensor | None
    """Numbers of the levels of ``trajectory`` that are read; None: all, as they are stored."""

    def caption_numbers(self, row: int) -> list[int]:
        """Return which captions, and so which rows of conditions, a sample has."""
        numbers: list[int] = self.condition_id[row].tolist()
        return [number for number in numbers if number >= 0]

    def states(self, row: int) -> Tensor | None:
        """Return the states of a sample that are read, [S, C, T, H, W]."""
        if self.trajectory is None or self.levels is None:
            return None if self.trajectory is None else self.trajectory[row]
        return self.trajectory[row].index_select(0, self.levels)

    def id(self, row: int) -> str:
        """Return the id of a sample, after the name of its data set if there are several."""
        return self.file.prefix + self.ids[row]


class LatentDataset:
    """Samples by number, from memory-mapped shards that are opened when first needed.

    Of several data sets the samples are counted through, in the order of the config.

    ``read`` may be called from several threads: a shard that two of them open at once is mapped
    twice, and one of the equal maps is kept.

    Args:
        config: the folders, and how much of them is verified now.
        shapes: those of samples that the model takes, see ``dataset_info``; empty takes what
            there is.
        clips: (C, T, H, W) of the clips that are to be made for captions alone, one or several.
        parts: names of the parts of latents that are read, where samples have several; empty: the
            main one alone, as one tensor.
        times: levels t of the stored trajectories that are read with each sample, in this order;
            none are read by default, as they are several times the size of the latents.

    Raises:
        DataError: with every problem of the data set, its file and the way out.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        shapes: Sequence[SampleShape] = (),
        clips: Sequence[LatentShape] = (),
        parts: Sequence[str] = (),
        times: tuple[float, ...] = (),
    ) -> None:
        info = data_info(config, shapes=shapes, times=times)
        if info.problems:
            raise DataError("\n".join(info.problems))
        self.config = config
        self.sources = info.sources
        self.clips = tuple(clips)
        self._files = [
            _File(source=source, entry=entry, prefix=f"{source.name}/" if config.sets[1:] else "")
            for source in self.sources
            for entry in source.index.shards
        ]
        for shape in (shape for source in self.sources for shape in source.index.shapes):
            if parts and tuple(shape.parts) != tuple(parts):
                raise DataError(
                    f"{', '.join(str(one.path) for one in self.sources)}: latents are "
                    f"{', '.join(shape.parts) or 'one tensor'}, and {', '.join(parts)} are to be "
                    "read. Use a data set that has these parts"
                )
        if config.verify == "full":
            self._compare_hashes()
        self._shards: list[_Shard | None] = [None] * len(self._files)
        self._parts = tuple(parts)
        self._times = times
        self._ends = list(itertools.accumulate(file.entry.samples for file in self._files))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def computed_by(self) -> Fingerprint:
        """What computed the data sets, as far as they agree."""
        first, *others = (source.index.computed_by for source in self.sources)
        return {
            name: value
            for name, value in first.items()
            if all(other.get(name) == value for other in others)
        }

    def read(
        self, samples: Tensor, choices: Tensor | None = None, *, clip: LatentShape | None = None
    ) -> Batch:
        """Read samples by number (int64 [B]), in that order: latents, conditions and the levels of
        trajectories that were asked for, in fp32.

        Args:
            choices: int64 [B], at least 0: of a sample with K captions, the one of the number
                ``choice % K`` is read; None: the first.
            clip: (C, T, H, W) of what is to be made for captions alone.

        Raises:
            DataError: a shard that is damaged, with its name; or samples of different shapes.
        """
        places = self._locate_all(samples)
        has_latents = self._common_shape(places).latents is not None
        latents = [shard.latents[row] for shard, row in places if shard.latents is not None]
        states = [states for shard, row in places if (states := shard.states(row)) is not None]
        read: Latents | None = _stack(latents) if has_latents else None
        if has_latents and self._parts:
            read = LatentParts(
                {
                    name: _stack([shard.parts[name][row] for shard, row in places])
                    for name in self._parts
                }
            )
        return Batch(
            latents=read,
            latent_shape=clip,
            cond=self._read_conditions(places, choices),
            ids=tuple(shard.id(row) for shard, row in places),
            trajectory=_stack(states) if self._times else None,
        )

    def read_conditions(self, samples: Tensor, choices: Tensor | None = None) -> Condition:
        """Read the conditions of ``read`` alone, of samples whose latents may differ in shape.

        Raises:
            DataError: a shard that is damaged, or conditions of different shapes.
        """
        return self._read_conditions(self._locate_all(samples), choices)

    def has_several_captions(self, samples: Tensor) -> bool:
        """Tell whether one of the shards that hold ``samples`` has samples with several captions.

        Raises:
            DataError: a shard that is damaged.
        """
        return any(shard.condition_id.shape[1] > 1 for shard, _ in self._locate_all(samples))

    def _read_conditions(
        self, places: Sequence[tuple[_Shard, int]], choices: Tensor | None
    ) -> Condition:
        draws: list[int] = [0] * len(places) if choices is None else choices.tolist()
        tables: dict[str, list[Tensor]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for (shard, row), draw in zip(places, draws, strict=True):
            numbers = shard.caption_numbers(row)
            number = numbers[draw % len(numbers)]
            for name, table in shard.conditions.items():
                if shapes.setdefault(name, table.shape) != table.shape:
                    self._common_shape(places)  # raises
                tables.setdefault(name, []).append(table.row(number))
        return Condition({name: _pad(rows, shapes[name]) for name, rows in tables.items()})

    def _common_shape(self, places: Sequence[tuple[_Shard, int]]) -> SampleShape:
        files = [shard.file for shard in dict.fromkeys(shard for shard, _ in places)]
        shapes = [file.entry.shape for file in files]
        if any(shape != shapes[0] for shape in shapes):
            raise DataError(
                f"{files[0].source.path}: samples of the shapes {'; '.join(map(str, shapes))} "
                "cannot be one batch. Read each shape by itself, as LatentLoader does."
            )
        return shapes[0]

    def caption(self, sample: int) -> str:
        """Return the first caption of one sample."""
        return self.captions(sample)[0]

    def captions(self, sample: int) -> tuple[str, ...]:
        """Return all captions of one sample."""
        shard, row = self._locate(sample)
        return tuple(shard.captions[number] for number in shard.caption_numbers(row))

    def id(self, sample: int) -> str:
        """Return the id of one sample, after the name of its data set if there are several."""
        shard, row = self._locate(sample)
        return shard.id(row)

    def _locate_all(self, samples: Tensor) -> list[tuple[_Shard, int]]:
        """Return shard and row of each sample; all shards are open then, so that a damaged one is
        noticed before memory is taken for what it says."""
        numbers: list[int] = samples.tolist()
        return [self._locate(number) for number in numbers]

    def _locate(self, sample: int) -> tuple[_Shard, int]:
        number = bisect.bisect_right(self._ends, sample)
        shard = self._open(number)
        return shard, sample - self._ends[number] + shard.file.entry.samples

    def negative(self, prompt: str | None = None) -> StoredNegative | None:
        """Read a negative condition of the data sets (fp32); None if they have none.

        It may hold fewer tensors than the samples: of those that it lacks, such as an image, a
        sample keeps its own.

        Args:
            prompt: the one of this prompt, if it is there; None: the only one.

        Raises:
            ConditioningError: a tensor of it is none of the samples'; or there are several, and
                none is asked for.
        """
        sets = [_read_negatives(one) for one in self.sources if one.index.constants is not None]
        if prompt is None:
            stored = [first for first, *_ in sets]
        else:
            stored = [one for negatives in sets for one in negatives if one.prompt == prompt]
        prompts = dict.fromkeys(one.prompt for one in stored)
        if len(prompts) > 1:
            raise ConditioningError(
                f"the data sets have different negative prompts ({', '.join(map(repr, prompts))}), "
                "and one condition stands for all samples. Set ConditioningConfig.negative_prompt"
            )
        return stored[0] if stored else None

    def _compare_hashes(self) -> None:
        damaged = [
            f"{file.path}: its SHA-256 is not the one in the index, so bytes of it "
            f"changed after it was written. {REBUILD}"
            for file in self._files
            if sha256_of_file(file.path) != file.entry.sha256
        ]
        if damaged:
            raise DataError("\n".join(damaged))

    def _open(self, number: int) -> _Shard:
        shard = self._shards[number]
        if shard is None:
            shard = self._shards[number] = _map_shard(self._files[number], self._times, self._parts)
        return shard


def _read_negatives(source: DataSource) -> list[StoredNegative]:
    """Read the negative condition, and the further ones after it."""
    assert source.index.constants is not None
    path = source.path / source.index.constants
    tensors, metadata = map_tensors(path)
    prompts = {
        NEGATIVE: [read_negative_prompt(path, metadata)],
        MORE_NEGATIVES: read_more_negative_prompts(path, metadata),
    }
    found: list[StoredNegative] = []
    for prefix, texts in prompts.items():
        own = {
            name.removeprefix(prefix): _as_fp32(value)
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        if own or texts:
            _check_negative_rows(path, own, len(texts), source)
        rows = Condition(own)
        found += [
            StoredNegative(prompt=text, condition=rows[number : number + 1])
            for number, text in enumerate(texts)
        ]
    return found


def _check_negative_rows(
    path: Path, tensors: Mapping[str, Tensor], rows: int, source: DataSource
) -> None:
    stored = {name: tuple(value.shape) for name, value in tensors.items()}
    for shape in source.index.shapes:
        expected = {name: (rows, *row) for name, row in shape.conditions.items()}
        if not stored or not stored.items() <= expected.items():
            raise ConditioningError(
                f"{path}: the negative condition holds {stored}, but the samples need "
                f"{expected}; one must be able to stand for the other. {REBUILD}"
            )


def _map_shard(file: _File, times: tuple[float, ...], parts: Sequence[str]) -> _Shard:
    path, entry, index = file.path, file.entry, file.source.index
    tensors, metadata = map_tensors(path)
    _check_tensors(path, tensors, entry, len(index.trajectory_times))
    ids = tensors["condition_id"]
    levels = find_levels(times, index.trajectory_times)
    shard = _Shard(
        file=file,
        latents=tensors.get("latents"),
        parts={name: tensors[part_tensor(name, entry.shape)] for name in parts},
        conditions={
            name: _table(path, tensors, name, shape)
            for name, shape in entry.shape.conditions.items()
        },
        condition_id=(ids if ids.ndim == 2 else ids[:, None]).numpy(),
        ids=read_texts(path, metadata, "ids"),
        captions=read_texts(path, metadata, "captions"),
        trajectory=tensors.get(TRAJECTORY) if times else None,
        levels=(
            None
            if levels == tuple(range(len(index.trajectory_times)))
            else torch.tensor(levels, dtype=torch.int64)
        ),
    )
    _check_rows(path, shard, entry.samples)
    return shard


def _check_tensors(
    path: Path, tensors: Mapping[str, Tensor], entry: ShardEntry, levels: int
) -> None:
    """Raise if names, shapes or types of a shard's tensors are not those of its entry."""
    latents, conditions = entry.shape.latents, entry.shape.conditions
    found = {
        name: tuple(value.shape[1:])
        for name, value in tensors.items()
        if value.ndim and name != "condition_id" and not name.startswith(LENGTHS)
    }
    expected = {CONDITION + name: shape for name, shape in conditions.items()}
    cut = {name for name in expected if LENGTHS + name.removeprefix(CONDITION) in tensors}
    expected |= {name: expected[name][1:] for name in cut}
    if latents is not None:
        expected["latents"] = latents
        for name, size in entry.shape.parts.items():
            expected[part_tensor(name, entry.shape)] = size
        if levels:
            expected[TRAJECTORY] = (levels, *latents)
    ids = tensors.get("condition_id")
    counted = ids is not None and ids.dtype == torch.int64 and ids.ndim in (1, 2)
    named = {"latents", TRAJECTORY, *(part_tensor(n, entry.shape) for n in entry.shape.parts)}
    floats = [tensors[name] for name in named if name in tensors]
    if found != expected or not counted or not all(v.is_floating_point() for v in floats):
        raise DataError(
            f"{path}: one row of its tensors is {found}, but the index states {expected}. {REBUILD}"
        )


def _table(path: Path, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> _Table:
    values, lengths = tensors[CONDITION + name], tensors.get(LENGTHS + name)
    if lengths is None:
        return _Table(values=values, shape=shape)
    most = shape[0] if shape else -1
    counts = lengths.dtype == torch.int64 and lengths.ndim == 1
    if not counts or not bool(((lengths >= 0) & (lengths <= most)).all()):
        raise DataError(f"{path}: the lengths of {name!r} are none of its rows. {REBUILD}")
    ends = lengths.cumsum(0)
    if (int(ends[-1]) if len(ends) else 0) != len(values):
        raise DataError(
            f"{path}: the lengths of {name!r} sum to another number than its {len(values)} stored "
            f"rows. {REBUILD}"
        )
    return _Table(values=values, shape=shape, ends=ends)


def _check_rows(path: Path, shard: _Shard, samples: int) -> None:
    counts = {len(shard.condition_id), len(shard.ids), samples}
    stored = (shard.latents, shard.trajectory, *shard.parts.values())
    counts |= {len(value) for value in stored if value is not None}
    captions = len(shard.captions)
    rows = {
        len(table.values if table.ends is None else table.ends)
        for table in shard.conditions.values()
    }
    ids = shard.condition_id
    inside = ((ids >= -1) & (ids < captions)).all() and (ids[:, :1] >= 0).all()
    gaps = (ids[:, 1:] >= 0) & (ids[:, :-1] < 0)  # -1 stands at the end alone
    if len(counts) != 1 or rows != {captions} or not inside or gaps.any():
        raise DataError(
            f"{path}: {len(shard.condition_id)} samples, {len(shard.ids)} ids and {rows} "
            f"conditions for {captions} captions do not belong together (the index states "
            f"{samples} samples). {REBUILD}"
        )


def _stack(rows: Sequence[Tensor]) -> Tensor:
    """Copy rows of one shape out of their files, [B, ...], in fp32 where they are floats."""
    return _as_fp32(torch.stack(list(rows)))


def _pad(rows: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Stack rows, with zeros after those that are shorter than ``shape``."""
    if all(row.shape == shape for row in rows):
        return _stack(rows)
    kind = torch.float32 if rows[0].is_floating_point() else rows[0].dtype
    padded = torch.zeros(len(rows), *shape, dtype=kind)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded


def _as_fp32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def read_conditions(path: Path) -> dict[str, Condition]:
    """Read the conditions of a shard, one row each in fp32, by their captions.

    Raises:
        DataError: missing, truncated, or no shard.
    """
    tensors, metadata = map_tensors(path)
    tables = {
        name: _table(path, tensors, name, shape)
        for name, shape in read_shape(path).conditions.items()
    }
    return {
        caption: Condition(
            {name: _pad([table.row(row)], table.shape) for name, table in tables.items()}
        )
        for row, caption in enumerate(read_texts(path, metadata, "captions"))
    }


def map_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Map the tensors of a file into memory (a page is read when it is used); also its metadata.

    Raises:
        DataError: missing, truncated, or not a safetensors file.
    """
    metadata = read_metadata(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: not a whole safetensors file ({error}); it was truncated or overwritten. "
            f"{REBUILD}"
        ) from error
