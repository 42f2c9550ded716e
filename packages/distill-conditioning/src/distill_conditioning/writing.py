"""Writing a latent data set: samples into shards, then the constants, then the index.

The files are described in ``distill_conditioning.format``. A condition is stored once a shard,
however many samples have it. Every file is written whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal
from uuid import uuid4

import torch
from distill_protocols import WHOLE_ENCODER, Condition, ConditioningError, DataError, Fingerprint
from distill_protocols.plugins import EMPTY
from distill_runtime import claim_folder, replace_file, sha256_of_file, write_new_file
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from distill_conditioning.fingerprints import compare_fingerprints, without_whole_encoder
from distill_conditioning.format import (
    CONDITION,
    CONSTANTS_FILE,
    INDEX_FILE,
    METADATA_KEY,
    NEGATIVE,
    DatasetIndex,
    ShardEntry,
    shard_file,
    split_fingerprint,
)

LatentDtype = Literal["float16", "bfloat16", "float32"]

DTYPES: Mapping[LatentDtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}

_Key = tuple[str, bytes]
"""A caption, and the hash of its condition."""


class ShardRows:
    """The samples of one shard, in memory and in their order, until ``write``.

    Attributes:
        bytes: size of the file to be, without names and header.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._ids: list[str] = []
        self._keys: list[_Key] = []
        self._columns: dict[str, list[Tensor]] = {}
        self._table: dict[_Key, Condition] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self, sample: str, caption: str, condition: Condition, columns: Mapping[str, Tensor]
    ) -> None:
        """Add a sample: its condition (one row) and its row of the shard's tensors, by name."""
        # Copied: a view would keep the whole batch in memory, and change with it.
        own = Condition(
            {name: v.detach().to("cpu", copy=True) for name, v in condition.tensors.items()}
        )
        # By content too: clips of one caption may begin with different images.
        key = (caption, _digest(own))
        if key not in self._table:
            self._table[key] = own
            self.bytes += sum(v.nbytes for v in own.tensors.values())
        self._ids.append(sample)
        self._keys.append(key)
        for name, value in columns.items():
            self._columns.setdefault(name, []).append(value)
            self.bytes += value.nbytes

    def write(self, path: Path) -> ShardEntry:
        """Write the shard's file. Equal samples give equal bytes."""
        number = {key: row for row, key in enumerate(self._table)}
        tensors = {name: torch.stack(values) for name, values in self._columns.items()}
        tensors["condition_id"] = torch.tensor([number[key] for key in self._keys])
        table = Condition.cat(list(self._table.values()))
        tensors |= {CONDITION + name: value for name, value in table.tensors.items()}
        captions = [caption for caption, _ in self._table]
        write_tensors(path, tensors, {"ids": self._ids, "captions": captions})
        return shard_entry(path, len(self))


def shard_entry(path: Path, samples: int) -> ShardEntry:
    """Make the index entry of a written shard."""
    size, digest = path.stat().st_size, sha256_of_file(path)
    return ShardEntry(file=path.name, samples=samples, bytes=size, sha256=digest)


def check_finite(ids: Sequence[str], values: Tensor, what: str) -> None:
    """Refuse what a cast to the stored type, or a model, has made infinite.

    Raises:
        DataError: with the ids of the samples.
    """
    finite = values.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        bad = [ids[int(row)] for row in (~finite).nonzero()[:, 0]]
        kind = str(values.dtype).removeprefix("torch.")
        raise DataError(
            f"{', '.join(bad)}: {what} are not finite as {kind}; training on them would spoil all "
            "weights. Check these clips, or store float32."
        )


def _digest(row: Condition) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(row.tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


class ShardWriter:
    """Writes a data set, shard by shard; ``index.json`` comes last and only without an error.

    ::

        fingerprint = {**adapter.latent_fingerprint(), **adapter.condition_fingerprint()}
        with ShardWriter(folder, fingerprint=fingerprint) as writer:
            writer.set_negative("", adapter.encode_neg_condition(""))
            writer.add(ids, captions, latents, condition)      # any number of times

    ``preprocess`` does all of that, the fingerprint included. What is not recorded, no run can
    compare with its own parts.

    Args:
        folder: made if it does not exist; must hold no data set and no rest of one.
        fingerprint: what computes latents and conditions, as far as it is known now (see
            ``record``).
        shard_bytes: a shard is written once it holds this much; until then it is in memory.
        latent_dtype: as stored. float16 keeps 11 bits of a posterior mean, whose values are ~10.

    Raises:
        DataError: the folder holds a data set already, or the rest of an interrupted one.
        OutputError: another process is writing there.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        fingerprint: Fingerprint = EMPTY,
        shard_bytes: int = 256 * 2**20,
        latent_dtype: LatentDtype = "float16",
    ) -> None:
        self.folder = Path(folder)
        self.fingerprint = dict(fingerprint)
        self.samples = 0
        self._shard_bytes = shard_bytes
        self._latent_dtype: LatentDtype = latent_dtype
        self._shards: list[ShardEntry] = []
        self._latent_shape: tuple[int, ...] | None = None
        self._conditions: dict[str, tuple[int, ...]] | None = None
        self._negative: tuple[str, Condition] | None = None
        self._rows = ShardRows()
        self._claim = claim_folder(self.folder, "writer")
        old = [*self.folder.glob("shard-*.safetensors"), *self.folder.glob(INDEX_FILE)]
        if old:
            self._claim.close()
            raise DataError(
                f"{self.folder}: holds {old[-1].name} already; two data sets in one folder could "
                "not be told apart. Name a new folder, or delete this one (without an "
                f"{INDEX_FILE} it is the rest of an interrupted preprocessing)."
            )

    def record(self, fingerprint: Fingerprint) -> None:
        """Record what computes latents and conditions: entries are added to those before.

        Raises:
            DataError: an entry has another value than before: no run could tell which samples are
                of which.
        """
        known = without_whole_encoder(self.fingerprint)
        changed = compare_fingerprints(known, fingerprint).differences
        if changed:
            listed = "; ".join(f"{d.name} was {d.stored} and is {d.own}" for d in changed)
            raise DataError(
                f"{self.folder}: what computes the data set has changed while it is written "
                f"({listed}); no run could tell which samples fit its model. Encode all with the "
                "same parts, into a new folder"
            )
        self.fingerprint.update(fingerprint)

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
        """Append B samples.

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
        """Write the last shard, the constants and then the index.

        Raises:
            DataError: no samples were added.
        """
        if len(self._rows):
            self._finish_shard()
        if self._latent_shape is None or self._conditions is None or self.samples == 0:
            raise DataError(f"{self.folder}: no sample was added; a data set needs at least one")
        if self._negative is not None:
            encoder = self.fingerprint.get(WHOLE_ENCODER)
            write_constants(self.folder, *self._negative, encoder=encoder)
        # Last: a folder without an index is no data set, whatever was interrupted before.
        index = DatasetIndex(
            latent_shape=self._latent_shape,  # type: ignore[arg-type]
            latent_dtype=self._latent_dtype,
            conditions=self._conditions,
            samples=self.samples,
            shards=tuple(self._shards),
            constants=CONSTANTS_FILE if self._negative else None,
            **split_fingerprint(self.fingerprint),
        )
        write_text(self.folder / INDEX_FILE, index.to_json())
        self._claim.close()
        return index

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._claim:
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


def write_constants(
    folder: Path, prompt: str, condition: Condition, *, encoder: str | None
) -> None:
    """Write the negative condition of a data set: one row, with its prompt.

    Args:
        encoder: ``DatasetIndex.encoder``, which earlier releases look for here too.
    """
    write_tensors(
        folder / CONSTANTS_FILE,
        {NEGATIVE + name: value for name, value in condition.tensors.items()},
        {"negative_prompt": prompt, "encoder": encoder},
    )


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]
) -> None:
    """Write ``tensors`` with ``metadata`` (JSON) as a safetensors file, whole or not at all."""
    with replace_file(path) as part:
        try:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
                part,
                metadata={METADATA_KEY: json.dumps(dict(metadata))},
            )
        except SafetensorError as error:  # a full disk
            raise OSError(errno.EIO, str(error), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replace_file(path) as part:
        part.write_text(text)


def write_new_text(path: Path, text: str) -> bool:
    """Write a text file that must not be there yet, whole or not at all; whether it was this
    process that wrote it."""
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        write_new_file(part, text.encode())
        try:
            # Unlike a rename, this refuses to take the place of what another has just written.
            os.link(part, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                write_new_file(path, text.encode())
            except FileExistsError:
                return False
    finally:
        part.unlink(missing_ok=True)
    return True
