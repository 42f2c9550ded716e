"""Latents and their conditions in safetensors shards: the writer and the memory-mapped reader.

The layout of the folder is told in ``distill_conditioning.index``.
Letters: N samples of a shard, P distinct captions of it, B batch, C T H W as everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Literal

import torch
from attrs import frozen
from distill_protocols import Batch, Condition, ConditioningError, DataError
from torch import Tensor

from distill_conditioning.config import DataConfig
from distill_conditioning.facts import dataset_info
from distill_conditioning.index import (
    CONSTANTS_FILE,
    INDEX_FILE,
    REBUILD,
    DatasetIndex,
    ShardEntry,
    places_of,
    shard_file,
)
from distill_conditioning.shard_rows import CONDITION, ShardRows, check_finite
from distill_conditioning.tensor_file import (
    map_tensors,
    sha256_of_file,
    write_tensors,
    written_whole,
)

NEGATIVE = "negative."
TRAJECTORY = "trajectory"

LatentDtype = Literal["float16", "bfloat16", "float32"]

DTYPES: Mapping[LatentDtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


class ShardWriter:
    """Writes a data set, shard by shard; ``index.json`` comes last and only if all went well.

    ::

        with ShardWriter(folder, encoder=adapter.condition_fingerprint()) as writer:
            writer.set_negative("", adapter.encode_neg_condition(""))
            writer.add(ids, captions, latents, condition)      # any number of times

    Args:
        folder: made if need be; must hold no data set and no rest of one.
        encoder: fingerprint of what encodes the captions, None if unknown.
        shard_bytes: a shard is written once it holds this much; until then it is in memory.
        latent_dtype: as stored. float16 keeps 11 bits of a posterior mean, whose values are ~10.

    Raises:
        DataError: the folder holds a data set already, or the rest of an interrupted one.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        encoder: str | None,
        shard_bytes: int = 256 * 2**20,
        latent_dtype: LatentDtype = "float16",
    ) -> None:
        self.folder = Path(folder)
        self.encoder = encoder
        self.samples = 0
        self._shard_bytes = shard_bytes
        self._latent_dtype: LatentDtype = latent_dtype
        self._shards: list[ShardEntry] = []
        self._latent_shape: tuple[int, ...] | None = None
        self._conditions: dict[str, tuple[int, ...]] | None = None
        self._negative: tuple[str, Condition] | None = None
        self._rows = ShardRows()
        self.folder.mkdir(parents=True, exist_ok=True)
        old = [*self.folder.glob("shard-*.safetensors"), *self.folder.glob(INDEX_FILE)]
        if old:
            raise DataError(
                f"{self.folder}: holds {old[-1].name} already; two data sets in one folder could "
                "not be told apart. Name a new folder, or delete this one (without an "
                f"{INDEX_FILE} it is the rest of an interrupted preprocessing)."
            )

    def set_negative(self, prompt: str, condition: Condition) -> None:
        """Store the negative condition (one row) beside the samples.

        Raises:
            ConditioningError: not one row.
        """
        if len(condition) != 1:
            raise ConditioningError(
                f"the negative condition has {len(condition)} rows; it must have one, because it "
                "stands for every sample"
            )
        self._negative = (prompt, condition)

    def add(
        self, ids: Sequence[str], captions: Sequence[str], latents: Tensor, condition: Condition
    ) -> None:
        """Append B samples. A condition is stored once a shard, however many samples have it.

        Args:
            latents: [B, C, T, H, W], raw posterior means, not normalised.
            condition: B rows.

        Raises:
            DataError: other counts or shapes than the samples before, or a value that is not
                finite (also after the cast to the stored type).
        """
        counts = {len(ids), len(captions), latents.shape[0], len(condition)}
        if len(counts) != 1:
            raise DataError(
                f"{len(ids)} ids, {len(captions)} captions, {latents.shape[0]} latents and "
                f"{len(condition)} conditions; there must be one of each a sample"
            )
        stored = latents.detach().to("cpu", DTYPES[self._latent_dtype], copy=True)
        self._check_shapes(ids, stored, condition)
        for row, (sample, caption) in enumerate(zip(ids, captions, strict=True)):
            own = condition[row : row + 1]
            self._rows.add(sample, caption, own, {"latents": stored[row]})
            if self._rows.bytes >= self._shard_bytes:
                self._finish_shard()

    def close(self) -> DatasetIndex:
        """Write what is left, the constants and then the index.

        Raises:
            DataError: no samples were added.
        """
        if len(self._rows):
            self._finish_shard()
        if self._latent_shape is None or self._conditions is None or self.samples == 0:
            raise DataError(f"{self.folder}: no sample was added; a data set needs at least one")
        self._write_constants()
        index = DatasetIndex(
            latent_shape=self._latent_shape,  # type: ignore[arg-type]
            latent_dtype=self._latent_dtype,
            conditions=self._conditions,
            encoder=self.encoder,
            samples=self.samples,
            shards=tuple(self._shards),
            constants=CONSTANTS_FILE if self._negative else None,
        )
        with written_whole(self.folder / INDEX_FILE) as part:
            part.write_text(index.to_json())
        return index

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()

    def _check_shapes(self, ids: Sequence[str], latents: Tensor, condition: Condition) -> None:
        shape = tuple(latents.shape[1:])
        rows = {name: tuple(value.shape[1:]) for name, value in condition.tensors.items()}
        if self._latent_shape is None or self._conditions is None:
            if len(shape) != 4:
                raise DataError(f"{ids[0]}: latents are {list(shape)}; they must be [C, T, H, W]")
            self._latent_shape, self._conditions = shape, rows
        if (shape, rows) != (self._latent_shape, self._conditions):
            raise DataError(
                f"{ids[0]}: latents {list(shape)} and conditions {rows}, but the samples before "
                f"have {list(self._latent_shape)} and {self._conditions}; all must be alike to "
                "be batched. Preprocess each size into a folder of its own."
            )
        check_finite(ids, latents, "latents")

    def _finish_shard(self) -> None:
        path = self.folder / shard_file(len(self._shards))
        self._shards.append(self._rows.write(path))
        self.samples += len(self._rows)
        self._rows = ShardRows()

    def _write_constants(self) -> None:
        if self._negative is not None:
            write_constants(self.folder, *self._negative, encoder=self.encoder)


def write_constants(
    folder: Path, prompt: str, condition: Condition, *, encoder: str | None
) -> None:
    """The negative condition of a data set: one row, and what made it."""
    write_tensors(
        folder / CONSTANTS_FILE,
        {NEGATIVE + name: value for name, value in condition.tensors.items()},
        {"negative_prompt": prompt, "encoder": encoder},
    )


@frozen(eq=False, kw_only=True)
class StoredNegative:
    """The negative condition that came with a data set, and what made it."""

    prompt: str
    encoder: str | None
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
        DataError: every problem that was found, with the file's name and the way out.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        latent_shape: tuple[int, ...] | None = None,
        condition_shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
        times: tuple[float, ...] = (),
    ) -> None:
        facts = dataset_info(
            config.path,
            latent_shape=latent_shape,
            condition_shapes=condition_shapes,
            times=times,
        )
        if facts.index is None or facts.problems:
            raise DataError("\n".join(facts.problems))
        self.config = config
        self.path = facts.path
        self.index = facts.index
        if config.verify == "full":
            self._compare_hashes()
        self._shards: list[_Shard | None] = [None] * len(self.index.shards)
        counts = torch.tensor([shard.samples for shard in self.index.shards])
        self._levels = torch.tensor(places_of(times, self.index.trajectory_times))
        self._ends = counts.cumsum(0)
        self._starts = self._ends - counts

    def __len__(self) -> int:
        return self.index.samples

    def read(self, samples: Tensor) -> Batch:
        """Samples by number (int64 [B]), in that order: latents, conditions and the levels of
        trajectories that were asked for, in fp32.

        Raises:
            DataError: a shard that is damaged, with its name.
        """
        shards = torch.searchsorted(self._ends, samples, right=True)
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
        """The caption of one sample."""
        shard, row = self._place(sample)
        return shard.captions[int(shard.condition_id[row])]

    def id(self, sample: int) -> str:
        """The id of one sample."""
        shard, row = self._place(sample)
        return shard.ids[row]

    def _place(self, sample: int) -> tuple[_Shard, int]:
        number = int(torch.searchsorted(self._ends, sample, right=True))
        return self._open(number), sample - int(self._starts[number])

    def negative(self) -> StoredNegative | None:
        """The negative condition that came with the data set (fp32), None if none did.

        It may hold fewer tensors than the samples: of those that it lacks, a picture for one, a
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
        found = {name: tuple(value.shape) for name, value in condition.tensors.items()}
        expected = {name: (1, *shape) for name, shape in self.index.conditions.items()}
        if not found or not found.items() <= expected.items():
            raise ConditioningError(
                f"{path}: the negative condition holds {found}, but the samples need {expected}; "
                f"one must be able to stand for the other. {REBUILD}"
            )
        return StoredNegative(
            prompt=metadata["negative_prompt"], encoder=metadata["encoder"], condition=condition
        )

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
        found = {name: tuple(value.shape[1:]) for name, value in tensors.items()}
        if found != expected:
            raise DataError(
                f"{path}: one row of its tensors is {found}, but the index says {expected}. "
                f"{REBUILD}"
            )
        shard = _Shard(
            latents=tensors["latents"],
            conditions=_conditions(tensors),
            condition_id=tensors["condition_id"],
            ids=metadata["ids"],
            captions=metadata["captions"],
            trajectory=tensors.get(TRAJECTORY),
        )
        _check_rows(path, shard, entry.samples)
        return shard


def _conditions(tensors: Mapping[str, Tensor]) -> Condition:
    return Condition(
        {
            name.removeprefix(CONDITION): value
            for name, value in tensors.items()
            if name.startswith(CONDITION)
        }
    )


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
