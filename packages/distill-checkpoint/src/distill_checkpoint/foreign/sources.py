"""Weights that are somewhere else: what is there is known at once, the numbers come when asked for.

All of these are ``WeightSource``s, so that a writer takes role by role and file by file, and never
holds more than it is writing. An opened ``.pt`` file is a ``TensorWeights`` of mapped tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from attrs import frozen
from distill_protocols import CheckpointError, TensorInfo, WeightSource
from distill_runtime import DTYPE_NAMES
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@frozen
class Renamed(WeightSource):
    """``source`` under other names.

    Attributes:
        names: name here -> name in ``source``.
    """

    source: WeightSource
    names: Mapping[str, str]

    @property
    def where(self) -> str:
        return self.source.where

    def describe(self) -> Mapping[str, TensorInfo]:
        theirs = self.source.describe()
        return {name: theirs[there] for name, there in self.names.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(names)
        tensors = self.source.read([self.names[name] for name in wanted])
        return {name: tensors[self.names[name]] for name in wanted}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.read_rows(self.names[name], start, stop)


@frozen
class Joined(WeightSource):
    """Several sources as one: ``<key>.<name>`` is ``name`` of the source ``key``."""

    parts: Mapping[str, WeightSource]

    @property
    def where(self) -> str:
        return next(part.where for part in self.parts.values())

    def describe(self) -> Mapping[str, TensorInfo]:
        return {
            f"{key}.{name}": facts
            for key, part in self.parts.items()
            for name, facts in part.describe().items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for full in names:
            key, name = full.split(".", 1)
            tensors[full] = self.parts[key].read([name])[name]
        return tensors

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        key, own = name.split(".", 1)
        return self.parts[key].read_rows(own, start, stop)


@frozen
class RankShards(WeightSource):
    """Tensors that were cut along their first dimension, a piece a rank (FSDP2's ``Shard(0)``).

    Attributes:
        ranks: each rank's pieces, in the order of the ranks; all have the same names.
    """

    where: str  # type: ignore[override]
    ranks: Sequence[Mapping[str, Tensor]]

    def describe(self) -> Mapping[str, TensorInfo]:
        return {
            name: TensorInfo(
                (sum(rank[name].shape[0] for rank in self.ranks), *first.shape[1:])
                if first.ndim
                else (),
                first.dtype,
            )
            for name, first in self.ranks[0].items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {
            name: torch.cat([rank[name] for rank in self.ranks])
            if self.ranks[0][name].ndim
            else self.ranks[0][name].clone()
            for name in names
        }


@frozen
class SafetensorsFile(WeightSource):
    """One safetensors file.

    Raises:
        CheckpointError: from ``facts`` and ``read``: it cannot be read.
    """

    file: Path

    @property
    def where(self) -> str:
        return str(self.file)

    def describe(self) -> Mapping[str, TensorInfo]:
        with _opened(self.file) as stream:
            slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            odd = {part.get_dtype() for part in slices.values()} - _DTYPES.keys()
            if odd:
                raise CheckpointError(
                    f"{self.file} holds tensors of type {', '.join(sorted(odd))}, which no model "
                    "here has: it is quantised, and would have to be turned back into numbers "
                    "first. Take the file that it was made from"
                )
            return {
                name: TensorInfo(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
                for name, part in slices.items()
            }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        with _opened(self.file) as stream:
            return {name: stream.get_tensor(name).clone() for name in names}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        with _opened(self.file) as stream:
            return stream.get_slice(name)[start:stop].clone()


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is no readable safetensors file ({error}): missing, cut short, a Git LFS "
            "pointer, or another format under that name. Copy or download it again"
        ) from error
