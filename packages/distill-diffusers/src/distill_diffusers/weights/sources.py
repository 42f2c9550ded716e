"""Weights in safetensors files, read on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from distill_protocols import TensorInfo, WeightsError, WeightSource
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distill_diffusers.folders import (
    DIFFUSERS_STEM,
    fetch,
    not_trained_from,
    transformer_names,
    weight_files,
)

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
GROUP_BYTES = 64 * 1024**2
"""Read at once: a quarter of it costs no more time, four times as much only memory."""


class FileWeights(WeightSource):
    """The weights in the safetensors files of one module, sharded or not.

    Args:
        where: what they are the weights of, for messages.
        files: each is opened once now, for names and sizes; numbers are read by ``read``.

    Raises:
        WeightsError: a file is unreadable, a name stands in two files, or numbers are quantised.
    """

    def __init__(self, where: str, files: Iterable[Path]) -> None:
        self._where = where
        self._infos: dict[str, TensorInfo] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            for name, info in _contents(file):
                if name in self._files:
                    raise WeightsError(
                        f"{name} is in {self._files[name]} and in {file.name}; which one counts "
                        "is unknown. Remove the shard that the index does not name"
                    )
                self._infos[name], self._files[name] = info, file

    @property
    def where(self) -> str:
        return self._where

    def describe(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        tensors = {}
        for file, keys in by_file.items():
            with _open(file) as stream:
                tensors.update({key: stream.get_tensor(key) for key in keys})
        return tensors

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Maps the file; what is not in these rows is not read."""
        with _open(self._files[name]) as stream:
            return stream.get_slice(name)[start:stop]


@frozen(eq=False)
class JoinedWeights(WeightSource):
    """Weights of several sources, each under a name of its own.

    Attributes:
        places: name -> (source, name there).
    """

    where: str  # type: ignore[override]
    places: Mapping[str, tuple[WeightSource, str]]

    def describe(self) -> Mapping[str, TensorInfo]:
        return {name: source.describe()[there] for name, (source, there) in self.places.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_source: dict[int, list[str]] = {}
        for name in names:
            by_source.setdefault(id(self.places[name][0]), []).append(name)
        tensors = {}
        for own in by_source.values():
            source = self.places[own[0]][0]
            read = source.read([self.places[name][1] for name in own])
            tensors.update({name: read.pop(self.places[name][1]) for name in own})
        return tensors

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        source, there = self.places[name]
        return source.read_rows(there, start, stop)


def folder_weights(
    path: str, modules: tuple[str, ...], *, has_index: bool = True
) -> dict[str, WeightSource]:
    """Return the weights of the transformers of a Diffusers-format folder or hub id, by module
    name.

    Args:
        modules: names that its transformers may have (``ModelKind.modules``).
        has_index: see ``ModelKind``.

    Raises:
        WeightsError: there are none, or they are damaged.
    """
    # All, as only the index states which there are; absent ones are simply not fetched.
    folder = fetch(path, modules)
    names = transformer_names(folder, modules, has_index=has_index)
    return {name: module_weights(folder / name) for name in names}


def module_weights(folder: Path) -> FileWeights:
    """Return the weights of one module's folder.

    Raises:
        WeightsError: there are none, or they are damaged.
    """
    return FileWeights(str(folder), weight_files(folder, DIFFUSERS_STEM))


def read_in_groups(
    source: WeightSource, names: Iterable[str], most: int = GROUP_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Read every tensor of ``names``, with no more than ``most`` bytes (or one tensor) at once."""
    infos = source.describe()
    for group in in_groups(names, lambda name: infos[name].nbytes, most):
        tensors = source.read(group)
        while tensors:  # each is let go of before the next is given
            yield tensors.popitem()


def in_groups(
    names: Iterable[str], nbytes: Callable[[str], int], most: int = GROUP_BYTES
) -> Iterator[list[str]]:
    """Divide ``names`` into lists of no more than ``most`` bytes, or one name."""
    group: list[str] = []
    size = 0
    for name in names:
        if group and size + nbytes(name) > most:
            yield group
            group, size = [], 0
        group.append(name)
        size += nbytes(name)
    if group:
        yield group


def metadata_of(file: Path) -> Mapping[str, str]:
    """Read the texts in the header of a safetensors file."""
    with _open(file) as stream:
        return stream.metadata() or {}


def _contents(file: Path) -> Iterator[tuple[str, TensorInfo]]:
    with _open(file) as stream:
        for name in stream.keys():  # noqa: SIM118 - safe_open is no mapping
            view = stream.get_slice(name)
            stored = view.get_dtype()
            if stored not in _DTYPES:
                raise WeightsError(f"{file}: {name} {not_trained_from(stored)}")
            yield name, TensorInfo(tuple(view.get_shape()), _DTYPES[stored])


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file} cannot be read ({error}): missing, cut short, or a Git LFS pointer. Download "
            "it again"
        ) from error
