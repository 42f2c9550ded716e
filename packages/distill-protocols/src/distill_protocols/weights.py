"""One module's weights, wherever they are: so that nobody must hold all of them at once.

A checkpoint, a model folder, a migrated file and a live module all look like this to whoever loads
or exports them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from attrs import frozen
from torch import Tensor


@frozen
class TensorInfo:
    """What a tensor is, without its numbers."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.size) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{list(self.size)} {str(self.dtype).removeprefix('torch.')}"


class WeightSource(Protocol):
    """Named tensors that are read on demand. Whoever inherits from it gets ``read_rows``."""

    @property
    def where(self) -> str:
        """What they are the weights of, for messages: a path, ``role student`` ..."""
        ...

    def describe(self) -> Mapping[str, TensorInfo]:
        """What there is, under the names of the module's own ``state_dict``. Reads no numbers."""
        ...

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors of ``names`` on the CPU. Not to be written to: they may be the
        original."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """``[start:stop]`` of a tensor's first dimension, as ``read`` gives the whole.

        For a process that holds a part of it. A source that need not read the rest for that does
        not: this one reads all, and cuts.
        """
        return self.read([name])[name][start:stop]


@frozen(eq=False)
class TensorWeights(WeightSource):
    """A ``WeightSource`` of tensors that are in memory, such as a live module's."""

    where: str  # type: ignore[override]
    tensors: Mapping[str, Tensor]

    def describe(self) -> Mapping[str, TensorInfo]:
        return {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in self.tensors.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.tensors[name].detach().cpu() for name in names}
