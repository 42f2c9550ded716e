"""Latents and their conditions in safetensors shards: the writer and the memory-mapped reader.

The layout of the folder is told in ``distill_conditioning.index``.
Letters: N samples of a shard, P distinct captions of it, B batch, C T H W as everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from attrs import frozen
from distill_protocols import Batch, Condition
from distill_protocols.errors import ConditioningError, DataError
from torch import Tensor

from distill_conditioning.config import DataConfig
from distill_conditioning.facts import dataset_facts
from distill_conditioning.index import (
    CONSTANTS_FILE,
    INDEX_FILE,
    REBUILD,
    DatasetIndex,
    ShardEntry,
)
from distill_conditioning.tensor_file import (
    map_tensors,
    sha256_of_file,
    write_tensors,
    written_whole,
)

CONDITION = "conditions."
NEGATIVE = "negative."

LatentDtype = Literal["float16", "bfloat16", "float32"]

_DTYPES: Mapping[LatentDtype, torch.dtype] = {
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
        self._start_shard()
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
        stored = latents.detach().to("cpu", _DTYPES[self._latent_dtype], copy=True)
        self._check_shapes(ids, stored, condition)
        for row, (sample, caption) in enumerate(zip(ids, captions, strict=True)):
            own = _own_row(condition, row)
            # By content too: clips of one caption may begin with different pictures.
            key = (caption, _digest(own))
            if key not in self._table:
                self._table[key] = own
                self._bytes += sum(v.nbytes for v in own.tensors.values())
            self._rows.append((sample, key, stored[row]))
            self._bytes += stored[row].nbytes
            if self._bytes >= self._shard_bytes:
                self._finish_shard()

    def close(self) -> DatasetIndex:
        """Write what is left, the constants and then the index.

        Raises:
            DataError: no samples were added.
        """
        if self._rows:
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
        finite = latents.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            bad = [ids[int(row)] for row in (~finite).nonzero()[:, 0]]
            raise DataError(
                f"{', '.join(bad)}: latents are not finite as {self._latent_dtype}; training on "
                "them would spoil all weights. Look at these clips, or store float32."
            )

    def _start_shard(self) -> None:
        self._rows: list[tuple[str, _Key, Tensor]] = []
        self._table: dict[_Key, Condition] = {}
        self._bytes = 0

    def _finish_shard(self) -> None:
        number = {key: row for row, key in enumerate(self._table)}
        captions = [caption for caption, _ in self._table]
        ids = [sample for sample, _, _ in self._rows]
        tensors = {
            "latents": torch.stack([latents for _, _, latents in self._rows]),
            "condition_id": torch.tensor([number[key] for _, key, _ in self._rows]),
        }
        table = Condition.cat(list(self._table.values()))
        tensors |= {CONDITION + name: value for name, value in table.tensors.items()}
        path = self.folder / f"shard-{len(self._shards):05d}.safetensors"
        write_tensors(path, tensors, {"ids": ids, "captions": captions})
        entry = ShardEntry(
            file=path.name,
            samples=len(ids),
            bytes=path.stat().st_size,
            sha256=sha256_of_file(path),
        )
        self._shards.append(entry)
        self.samples += len(ids)
        self._start_shard()

    def _write_constants(self) -> None:
        if self._negative is None:
            return
        prompt, condition = self._negative
        write_tensors(
            self.folder / CONSTANTS_FILE,
            {NEGATIVE + name: value for name, value in condition.tensors.items()},
            {"negative_prompt": prompt, "encoder": self.encoder},
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


class LatentDataset:
    """Samples by number, from memory-mapped shards that are opened when first needed.

    ``read`` may be called from several threads: a shard that two of them open at once is mapped
    twice, and one of the equal maps is kept.

    Args:
        config: the folder, and how much of it is verified now.
        latent_shape: (C, T, H, W) that the model takes, None to take what there is.
        text_shape: (L, D) of the text embeddings that the model takes.

    Raises:
        DataError: every fault that was found, with the file's name and the way out.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        latent_shape: tuple[int, ...] | None = None,
        text_shape: tuple[int, ...] | None = None,
    ) -> None:
        facts = dataset_facts(config.path, latent_shape=latent_shape, text_shape=text_shape)
        if facts.index is None or facts.faults:
            raise DataError("\n".join(facts.faults))
        self.config = config
        self.path = facts.path
        self.index = facts.index
        if config.verify == "full":
            self._compare_hashes()
        self._shards: list[_Shard | None] = [None] * len(self.index.shards)
        counts = torch.tensor([shard.samples for shard in self.index.shards])
        self._ends = counts.cumsum(0)
        self._starts = self._ends - counts

    def __len__(self) -> int:
        return self.index.samples

    def read(self, samples: Tensor) -> Batch:
        """Samples by number (int64 [B]), in that order: latents and conditions in fp32.

        Raises:
            DataError: a shard that is damaged, with its name.
        """
        shards = torch.searchsorted(self._ends, samples, right=True)
        rows = samples - self._starts[shards]
        latents = torch.empty(len(samples), *self.index.latent_shape)
        tables: dict[str, Tensor] = {}
        ids = [""] * len(samples)
        for number in shards.unique().tolist():
            shard = self._open(number)
            places = (shards == number).nonzero()[:, 0]
            inside = rows[places]
            latents[places] = shard.latents[inside].float()
            for name, value in shard.conditions[shard.condition_id[inside]].tensors.items():
                value = _as_fp32(value)
                if name not in tables:
                    tables[name] = value.new_empty(len(samples), *value.shape[1:])
                tables[name][places] = value
            for place, row in zip(places.tolist(), inside.tolist(), strict=True):
                ids[place] = shard.ids[row]
        return Batch(latents=latents, cond=Condition(tables), ids=tuple(ids))

    def caption(self, sample: int) -> str:
        """The caption of one sample."""
        number = int(torch.searchsorted(self._ends, sample, right=True))
        shard = self._open(number)
        return shard.captions[int(shard.condition_id[sample - int(self._starts[number])])]

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
        )
        _check_rows(path, shard, entry.samples)
        return shard


_Key = tuple[str, bytes]
"""A caption, and the hash of its condition."""


def _digest(row: Condition) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(row.tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def _own_row(condition: Condition, row: int) -> Condition:
    """One row, copied: a view would keep the whole batch, and change with it."""
    rows = condition[row : row + 1].tensors
    return Condition({name: value.detach().to("cpu", copy=True) for name, value in rows.items()})


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
