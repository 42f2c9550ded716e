"""Reading a latent data set: samples by number, from memory-mapped shards.

The files are described in ``distill_conditioning.format``.
Letters: N samples of a shard, P distinct captions of it, B batch, C T H W as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from attrs import frozen
from distill_protocols import Batch, Condition, ConditioningError, DataError
from distill_runtime import sha256_of_file
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill_conditioning.config import DataConfig
from distill_conditioning.dataset_info import dataset_info
from distill_conditioning.format import (
    CONDITION,
    NEGATIVE,
    REBUILD,
    TRAJECTORY,
    ShardEntry,
    content_hash,
    find_levels,
    read_metadata,
    read_negative_prompt,
    read_texts,
)


@frozen(eq=False, kw_only=True)
class StoredNegative:
    """The negative condition of a data set, with the prompt that it came from."""

    prompt: str
    condition: Condition


@frozen(eq=False, kw_only=True)
class _Shard:
    latents: Tensor
    conditions: Condition
    condition_id: Tensor
    ids: Sequence[str]
    captions: Sequence[str]
    trajectory: Tensor | None


class LatentDataset:
    """Samples by number, from memory-mapped shards that are opened when first needed.

    ``read`` may be called from several threads: a shard that two of them open at once is mapped
    twice, and one of the equal maps is kept.

    Args:
        config: the folder, and how much of it is verified now.
        latent_shape: (C, T, H, W) that the model takes, None to take what there is.
        condition_shapes: of one row of the condition tensors that the model takes, by name.
        times: levels t of the stored trajectories that are read with each sample, in this order;
            none are read by default, as they are several times the size of the latents.

    Raises:
        DataError: with every problem of the data set, its file and the way out.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        latent_shape: tuple[int, ...] | None = None,
        condition_shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        times: tuple[float, ...] = (),
    ) -> None:
        info = dataset_info(
            config.path,
            latent_shape=latent_shape,
            condition_shapes=condition_shapes,
            times=times,
        )
        if info.index is None or info.problems:
            raise DataError("\n".join(info.problems))
        self.config = config
        self.path = info.path
        self.index = info.index
        self.content_hash = content_hash(info.path, info.index)
        if config.verify == "full":
            self._compare_hashes()
        self._shards: list[_Shard | None] = [None] * len(self.index.shards)
        counts = torch.tensor([shard.samples for shard in self.index.shards])
        self._levels = torch.tensor(find_levels(times, self.index.trajectory_times))
        self._ends = counts.cumsum(0)
        self._starts = self._ends - counts

    def __len__(self) -> int:
        return self.index.samples

    def read(self, samples: Tensor) -> Batch:
        """Read samples by number (int64 [B]), in that order: latents, conditions and the levels of
        trajectories that were asked for, in fp32.

        Raises:
            DataError: a shard that is damaged, with its name.
        """
        shards = torch.searchsorted(self._ends, samples, right=True)
        for number in shards.unique().tolist():
            self._open(number)  # a damaged one is noticed before memory is taken for what it says
        rows = samples - self._starts[shards]
        latents = torch.empty(len(samples), *self.index.latent_shape)
        levels = self._levels
        states = torch.empty(len(samples), len(levels), *self.index.latent_shape)
        tables: dict[str, Tensor] = {}
        ids = [""] * len(samples)
        for number in shards.unique().tolist():
            shard = self._open(number)
            places = (shards == number).nonzero()[:, 0]
            inside = rows[places]
            latents[places] = shard.latents[inside].float()
            if len(levels) and shard.trajectory is not None:
                states[places] = shard.trajectory[inside[:, None], levels].float()
            for name, value in shard.conditions[shard.condition_id[inside]].tensors.items():
                value = _as_fp32(value)
                if name not in tables:
                    tables[name] = value.new_empty(len(samples), *value.shape[1:])
                tables[name][places] = value
            for place, row in zip(places.tolist(), inside.tolist(), strict=True):
                ids[place] = shard.ids[row]
        return Batch(
            latents=latents,
            cond=Condition(tables),
            ids=tuple(ids),
            trajectory=states if len(levels) else None,
        )

    def caption(self, sample: int) -> str:
        """Return the caption of one sample."""
        shard, row = self._locate(sample)
        return shard.captions[int(shard.condition_id[row])]

    def id(self, sample: int) -> str:
        """Return the id of one sample."""
        shard, row = self._locate(sample)
        return shard.ids[row]

    def _locate(self, sample: int) -> tuple[_Shard, int]:
        number = int(torch.searchsorted(self._ends, sample, right=True))
        return self._open(number), sample - int(self._starts[number])

    def negative(self) -> StoredNegative | None:
        """Read the negative condition of the data set (fp32); None if it has none.

        It may hold fewer tensors than the samples: of those that it lacks, such as an image, a
        sample keeps its own.

        Raises:
            ConditioningError: a tensor of it is none of the samples'.
        """
        if self.index.constants is None:
            return None
        path = self.path / self.index.constants
        tensors, metadata = map_tensors(path)
        condition = Condition(
            {
                name.removeprefix(NEGATIVE): _as_fp32(value)
                for name, value in tensors.items()
                if name.startswith(NEGATIVE)
            }
        )
        stored = {name: tuple(value.shape) for name, value in condition.tensors.items()}
        expected = {name: (1, *shape) for name, shape in self.index.conditions.items()}
        if not stored or not stored.items() <= expected.items():
            raise ConditioningError(
                f"{path}: the negative condition holds {stored}, but the samples need {expected}; "
                f"one must be able to stand for the other. {REBUILD}"
            )
        prompt = read_negative_prompt(path, metadata)
        return StoredNegative(prompt=prompt, condition=condition)

    def _compare_hashes(self) -> None:
        damaged = [
            f"{self.path / shard.file}: its SHA-256 is not the one in the index, so bytes of it "
            f"changed after it was written. {REBUILD}"
            for shard in self.index.shards
            if sha256_of_file(self.path / shard.file) != shard.sha256
        ]
        if damaged:
            raise DataError("\n".join(damaged))

    def _open(self, number: int) -> _Shard:
        shard = self._shards[number]
        if shard is None:
            shard = self._shards[number] = self._map(self.index.shards[number])
        return shard

    def _map(self, entry: ShardEntry) -> _Shard:
        path = self.path / entry.file
        tensors, metadata = map_tensors(path)
        expected = {CONDITION + name: shape for name, shape in self.index.conditions.items()}
        expected |= {"latents": self.index.latent_shape, "condition_id": ()}
        if self.index.trajectory_times:
            levels = len(self.index.trajectory_times)
            expected[TRAJECTORY] = (levels, *self.index.latent_shape)
        rows = {name: tuple(value.shape[1:]) for name, value in tensors.items() if value.ndim}
        if rows != expected or not _are_of_their_types(tensors):
            raise DataError(
                f"{path}: one row of its tensors is {rows}, but the index says {expected}. "
                f"{REBUILD}"
            )
        shard = _Shard(
            latents=tensors["latents"],
            conditions=Condition(
                {
                    name.removeprefix(CONDITION): value
                    for name, value in tensors.items()
                    if name.startswith(CONDITION)
                }
            ),
            condition_id=tensors["condition_id"],
            ids=read_texts(path, metadata, "ids"),
            captions=read_texts(path, metadata, "captions"),
            trajectory=tensors.get(TRAJECTORY),
        )
        _check_rows(path, shard, entry.samples)
        return shard


def _are_of_their_types(tensors: Mapping[str, Tensor]) -> bool:
    """Whether each tensor has rows, latents are numbers and ``condition_id`` counts."""
    counts = tensors["condition_id"].dtype == torch.int64
    latents = [tensors[name] for name in ("latents", TRAJECTORY) if name in tensors]
    return counts and all(value.is_floating_point() for value in latents)


def _check_rows(path: Path, shard: _Shard, samples: int) -> None:
    counts = {len(shard.latents), len(shard.condition_id), len(shard.ids), samples}
    if shard.trajectory is not None:
        counts.add(len(shard.trajectory))
    rows = len(shard.captions)
    inside = ((shard.condition_id >= 0) & (shard.condition_id < rows)).all()
    if len(counts) != 1 or len(shard.conditions) != rows or not inside:
        raise DataError(
            f"{path}: {len(shard.latents)} latents, {len(shard.ids)} ids and "
            f"{len(shard.conditions)} conditions for {rows} captions do not belong together "
            f"(the index says {samples} samples). {REBUILD}"
        )


def _as_fp32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


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
