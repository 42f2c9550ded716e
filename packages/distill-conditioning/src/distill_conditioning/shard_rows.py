"""The samples of one shard on their way into its file.

A condition is stored once a shard, however many samples have it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from distill_protocols import Condition, DataError
from torch import Tensor

from distill_conditioning.index import ShardEntry
from distill_conditioning.tensor_file import sha256_of_file, write_tensors

CONDITION = "conditions."

_Key = tuple[str, bytes]
"""A caption, and the hash of its condition."""


class ShardRows:
    """Samples in memory, in their order, until ``write``.

    Attributes:
        bytes: what the file will hold, names and header aside.
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
        """One sample: its condition (one row), and its own part of the shard's tensors by name."""
        own = _own_row(condition)
        # By content too: clips of one caption may begin with different pictures.
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
        """The shard's file, whole or not at all. Equal samples give equal bytes."""
        number = {key: row for row, key in enumerate(self._table)}
        tensors = {name: torch.stack(values) for name, values in self._columns.items()}
        tensors["condition_id"] = torch.tensor([number[key] for key in self._keys])
        table = Condition.cat(list(self._table.values()))
        tensors |= {CONDITION + name: value for name, value in table.tensors.items()}
        captions = [caption for caption, _ in self._table]
        write_tensors(path, tensors, {"ids": self._ids, "captions": captions})
        return shard_entry(path, len(self))


def shard_entry(path: Path, samples: int) -> ShardEntry:
    """What the index says of a written shard."""
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
            "weights. Look at these clips, or store float32."
        )


def _digest(row: Condition) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(row.tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def _own_row(row: Condition) -> Condition:
    """Copied: a view would keep the whole batch, and change with it."""
    return Condition({k: v.detach().to("cpu", copy=True) for k, v in row.tensors.items()})
