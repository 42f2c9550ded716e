"""Writing a latent data set: samples into shards, then the constants, then the index.

The files are described in ``distill_conditioning.format``. A condition is stored once a shard,
however many samples have it, and without its padding. Every file is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal
from uuid import uuid4

import torch
from distill_protocols import (
    WHOLE_ENCODER,
    Condition,
    ConditioningError,
    DataError,
    Fingerprint,
    LatentParts,
    Latents,
    TensorInfo,
    main_part,
)
from distill_protocols.plugins import EMPTY
from distill_runtime import (
    claim_folder,
    replace_file,
    sha256_of_file,
    write_new_file,
    write_safetensors,
)
from torch import Tensor

from distill_conditioning.fingerprints import compare_fingerprints, without_whole_encoder
from distill_conditioning.format import (
    CONDITION,
    CONSTANTS_FILE,
    INDEX_FILE,
    LENGTHS,
    METADATA_KEY,
    MORE_NEGATIVES,
    NEGATIVE,
    DatasetIndex,
    SampleShape,
    ShardEntry,
    part_tensor,
    read_shape,
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

_Row = Mapping[str, Tensor]
"""The tensors of one condition as they are stored."""


class ShardRows:
    """The samples of one shard, in memory and in their order, until ``write``.

    Conditions are kept as they will be stored: without the zeros at the end of each row, and in
    bf16 where that is all the precision that they have.

    Args:
        parts: names of the parts of latents, the main one first; empty: latents are one tensor.

    Attributes:
        bytes: size of the file to be, without names and header.
    """

    def __init__(self, parts: Iterable[str] = ()) -> None:
        self.bytes = 0
        self._parts = list(parts)
        self._ids: list[str] = []
        self._keys: list[list[_Key]] = []
        self._columns: dict[str, list[Tensor]] = {}
        self._table: dict[_Key, _Row] = {}
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def add(
        self,
        sample: str,
        caption: str | Sequence[str],
        condition: Condition,
        columns: Mapping[str, Tensor],
    ) -> None:
        """Add a sample: its condition and its row of the shard's tensors, by name.

        Args:
            caption: or several, of which the loader chooses one each time.
            condition: a row for each caption.
            columns: ``latents`` above all; empty in a data set of captions alone.

        Raises:
            DataError: the rows are not as many as the captions, or have another shape than those
                before: they could not be read as one tensor.
        """
        captions = [caption] if isinstance(caption, str) else list(caption)
        shapes = {name: tuple(v.shape[1:]) for name, v in condition.tensors.items()}
        if len(condition) != len(captions) or not captions or self._shapes not in (None, shapes):
            raise DataError(
                f"{sample}: {len(captions)} captions and {len(condition)} conditions of the shapes "
                f"{shapes} (those before: {self._shapes}); a sample of a shard has a condition for "
                "each caption, at least one, of the same shapes as all others"
            )
        self._shapes = shapes
        self._ids.append(sample)
        self._keys.append(
            [self._add_row(text, condition[i : i + 1]) for i, text in enumerate(captions)]
        )
        for name, value in columns.items():
            self._columns.setdefault(name, []).append(value)
            self.bytes += value.nbytes

    def write(self, path: Path) -> ShardEntry:
        """Write the shard's file. Equal samples give equal bytes."""
        number = {key: row for row, key in enumerate(self._table)}
        tensors = {name: torch.stack(values) for name, values in self._columns.items()}
        tensors["condition_id"] = _condition_ids([[number[k] for k in keys] for keys in self._keys])
        shapes = self._shapes or {}
        for name, shape in shapes.items():
            tensors |= _join_rows(name, shape, [row[name] for row in self._table.values()])
        captions = [caption for caption, _ in self._table]
        metadata = {"ids": self._ids, "captions": captions, "rows": shapes}
        if self._parts:
            metadata["parts"] = self._parts
        write_tensors(path, tensors, metadata)
        return shard_entry(path, len(self))

    def _add_row(self, caption: str, row: Condition) -> _Key:
        stored = {name: _without_padding(v[0].detach()) for name, v in row.tensors.items()}
        # By content too: clips of one caption may begin with different images.
        key = (caption, _digest(stored))
        if key not in self._table:
            self._table[key] = stored
            self.bytes += sum(v.nbytes for v in stored.values())
        return key


def _condition_ids(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return numbers of conditions [N], or [N, K] with -1 where a sample has less than K."""
    most = max(map(len, rows), default=1)
    padded = torch.tensor([[*row, *[-1] * (most - len(row))] for row in rows])
    return padded[:, 0] if most == 1 else padded


def _without_padding(row: Tensor) -> Tensor:
    """Copy a row to the CPU, in bf16 if that loses nothing, without the zeros at its end.

    Of the bits, so that what is read back is what was written: -0 is no zero here.
    """
    row = row.to("cpu", copy=True)
    if row.dtype == torch.float32:
        narrow = row.bfloat16()
        if torch.equal(narrow.float().view(torch.int32), row.view(torch.int32)):
            row = narrow
    if row.ndim == 0 or row.numel() == 0:
        return row
    used = row.reshape(len(row), -1).view(torch.uint8).any(dim=1).nonzero()
    # Copied once more: a view would keep the padding in memory.
    return row[: int(used[-1]) + 1 if len(used) else 0].clone()


def _join_rows(name: str, shape: tuple[int, ...], rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the table of one condition tensor, and the lengths of its rows if some were cut."""
    if len({row.dtype for row in rows}) > 1:
        rows = [row.float() for row in rows]
    if all(tuple(row.shape) == shape for row in rows):
        return {CONDITION + name: torch.stack(list(rows))}
    lengths = torch.tensor([len(row) for row in rows])
    return {CONDITION + name: torch.cat(list(rows)), LENGTHS + name: lengths}


def shard_entry(path: Path, samples: int) -> ShardEntry:
    """Make the index entry of a written shard."""
    return ShardEntry(
        file=path.name,
        samples=samples,
        bytes=path.stat().st_size,
        sha256=sha256_of_file(path),
        shape=read_shape(path),
    )


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


def _digest(row: _Row) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(row.items()):
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

    Samples of several sizes go into shards of their own; each call of ``add`` has one size.
    ``preprocess`` does all of that, the fingerprint included. What is not recorded, no run can
    compare with its own parts.

    Args:
        folder: made if it does not exist; must hold no data set and no rest of one.
        fingerprint: what computes latents and conditions, as far as it is known now (see
            ``record``).
        shard_bytes: a shard is written once it holds this much; until then it is in memory. Of
            samples of several shapes up to four times this much is in memory.
        latent_dtype: as stored. The README states what each costs.

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
        self._negative: tuple[str, Condition] | None = None
        self._shapes: list[SampleShape] = []
        self._rows: list[ShardRows] = []
        self._claim = claim_folder(self.folder, "writer")
        old = [*self.folder.glob("shard-*.safetensors"), *self.folder.glob(INDEX_FILE)]
        if old:
            self._claim.close()
            raise DataError(
                f"{self.folder}: holds {old[-1].name} already; two data sets in one folder could "
                "not be distinguished. Name a new folder, or delete this one (without an "
                f"{INDEX_FILE} it is the rest of an interrupted preprocessing)."
            )

    def record(self, fingerprint: Fingerprint) -> None:
        """Record what computes latents and conditions: entries are added to those before.

        Raises:
            DataError: an entry has another value than before: no run could know which samples are
                of which.
        """
        known = without_whole_encoder(self.fingerprint)
        changed = compare_fingerprints(known, fingerprint).differences
        if changed:
            listed = "; ".join(f"{d.name} was {d.stored} and is {d.own}" for d in changed)
            raise DataError(
                f"{self.folder}: what computes the data set has changed while it is written "
                f"({listed}); no run could know which samples fit its model. Encode all with the "
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
        self,
        ids: Sequence[str],
        captions: Sequence[str | Sequence[str]],
        latents: Latents | None,
        condition: Condition,
    ) -> None:
        """Append B samples of one size.

        Args:
            captions: one a sample, or several, of which the loader chooses one in each epoch.
            latents: [B, C, T, H, W], raw posterior means, not normalised, or several parts of them;
                None in a data set of captions alone.
            condition: a row for each caption, in the order of ``captions``.

        Raises:
            DataError: counts that do not fit, another kind of samples than before, or a value that
                is not finite (also after the cast to the stored type).
        """
        texts = [[own] if isinstance(own, str) else list(own) for own in captions]
        rows = sum(map(len, texts))
        counts = {len(ids), len(captions), len(ids) if latents is None else len(latents)}
        if len(counts) != 1 or rows != len(condition):
            raise DataError(
                f"{len(ids)} ids, captions of {len(captions)} samples ({rows} in all), "
                f"{'no' if latents is None else len(latents)} latents and {len(condition)} "
                "conditions; there must be one of each a sample, and a condition a caption"
            )
        if not ids:
            return
        number = self._find_shape(ids, latents, condition)
        columns: list[dict[str, Tensor]] = [{} for _ in ids]
        if latents is not None:
            shape, dtype = self._shapes[number], DTYPES[self._latent_dtype]
            parts = {"latents": main_part(latents)}
            if isinstance(latents, LatentParts):
                parts = {part_tensor(name, shape): v for name, v in latents.tensors.items()}
            for name, tensor in parts.items():
                stored = tensor.detach().to("cpu", dtype, copy=True)
                check_finite(ids, stored, name)
                for column, row in zip(columns, stored, strict=True):
                    column[name] = row
        first = 0
        for sample, own, column in zip(ids, texts, columns, strict=True):
            self._rows[number].add(sample, own, condition[first : first + len(own)], column)
            first += len(own)
            if self._rows[number].bytes >= self._shard_bytes:
                self._finish_shard(number)
        if sum(rows.bytes for rows in self._rows) >= 4 * self._shard_bytes:
            self._finish_shard(max(range(len(self._rows)), key=lambda n: self._rows[n].bytes))

    def close(self) -> DatasetIndex:
        """Write the last shards, the constants and then the index.

        Raises:
            DataError: no samples were added.
        """
        for number, rows in enumerate(self._rows):
            if len(rows):
                self._finish_shard(number)
        if self.samples == 0:
            raise DataError(f"{self.folder}: no sample was added; a data set needs at least one")
        if self._negative is not None:
            encoder = self.fingerprint.get(WHOLE_ENCODER)
            write_constants(self.folder, *self._negative, encoder=encoder)
        # Last: a folder without an index is no data set, whatever was interrupted before.
        index = DatasetIndex(
            latent_dtype=self._latent_dtype,
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

    def _find_shape(self, ids: Sequence[str], latents: Latents | None, condition: Condition) -> int:
        """Return the number of the samples' shape, a new one if need be."""
        rows = {name: tuple(value.shape[1:]) for name, value in condition.tensors.items()}
        size = None
        if latents is not None:
            main = main_part(latents)
            if main.ndim != 5:
                raise DataError(
                    f"{ids[0]}: latents are {list(main.shape[1:])}; they must be [C, T, H, W]"
                )
            channels, frames, height, width = main.shape[1:]
            size = (channels, frames, height, width)
        parts = latents.shapes if isinstance(latents, LatentParts) else {}
        shape = SampleShape(latents=size, conditions=rows, parts=parts)
        if shape in self._shapes:
            return self._shapes.index(shape)
        for other in self._shapes:
            mixed = (size is None) != (other.latents is None)
            if mixed or size == other.latents or rows.keys() != other.conditions.keys():
                raise DataError(
                    f"{ids[0]}: {shape}, but samples before have {other}; all must have latents "
                    "or none, the same conditions, and those of one latent shape the same shapes, "
                    "to be batched. Preprocess the others into a folder of their own."
                )
        self._shapes.append(shape)
        self._rows.append(ShardRows(shape.parts))
        return len(self._shapes) - 1

    def _finish_shard(self, number: int) -> None:
        path = self.folder / shard_file(len(self._shards))
        self._shards.append(self._rows[number].write(path))
        self.samples += len(self._rows[number])
        self._rows[number] = ShardRows(self._shapes[number].parts)


def write_constants(
    folder: Path,
    prompt: str,
    condition: Condition,
    *,
    encoder: str | None,
    more: Mapping[str, Condition] = EMPTY,
) -> None:
    """Write the negative condition of a data set: one row, with its prompt.

    Args:
        encoder: ``DatasetIndex.encoder``, which earlier releases look for here too.
        more: by prompt, further negative conditions of one row each.
    """
    tensors = {NEGATIVE + name: value for name, value in condition.tensors.items()}
    metadata: dict[str, object] = {"negative_prompt": prompt, "encoder": encoder}
    if more:
        rows = Condition.cat(list(more.values()))
        tensors |= {MORE_NEGATIVES + name: value for name, value in rows.tensors.items()}
        metadata["more_negative_prompts"] = list(more)
    write_tensors(folder / CONSTANTS_FILE, tensors, metadata)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]
) -> None:
    """Write ``tensors`` with ``metadata`` (JSON) as a safetensors file, whole or not at all."""
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    infos = {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in ready.items()}
    # Not safetensors' own writer: where its process is killed, it leaves a file of a name that is
    # nobody's, and its error of a full disk is no OSError.
    with replace_file(path) as part:
        write_safetensors(
            part, infos, ready.__getitem__, metadata={METADATA_KEY: json.dumps(dict(metadata))}
        )


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
