"""Files of other frameworks as weight sources: ``.pt`` and safetensors, under our names.

A pickle is a program, and is not run: ``torch.load(weights_only=True)`` interprets it with a
machine of its own that knows tensors and containers and nothing to call. The errors here state why
a file was refused, and what to do instead.

What is in a file is known at once, and its numbers are read when asked for, so that a writer takes
role by role and never holds more than it is writing.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from attrs import frozen
from distill_protocols import CheckpointError, ForeignNames, TensorInfo, WeightSource
from distill_runtime import DTYPES, UnreadableFileError, read_header
from safetensors import SafetensorError, safe_open
from torch import Tensor

# -- .pt files ------------------------------------------------------------------------------------

_CALLED = re.compile(r"(?:GLOBAL|global:?) (?:GLOBAL )?([\w.]+)")


def load_pt(file: Path) -> object:
    """Load what ``file`` holds; its tensors are mapped from the disk rather than read.

    Raises:
        CheckpointError: it is missing, no such file, or would call something when unpickled.
    """
    if file.exists() and not file.is_file():
        raise CheckpointError(f"{file} is no file, but a folder or a pipe; name a .pt file")
    try:
        # A file of before torch 1.6 is no zip, and only a zip can be mapped.
        return torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror or error}); name a file that is there and "
            "that this user may read"
        ) from error
    except Exception as error:  # a damaged pickle raises from anywhere
        raise _refusal(str(file), error) from error


def load_bytes(content: bytes, where: str) -> object:
    """Load a ``.pt`` file that is part of another file, as ``load_pt`` does.

    Raises:
        CheckpointError: it is no such file, or would call something when unpickled.
    """
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _refusal(where, error) from error


def as_tensors(value: object, where: str) -> Mapping[str, Tensor]:
    """``value``, if it is a mapping of names to plain tensors.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{where} is a {type(value).__name__}, where a state dict (name -> tensor) must be; "
            "save it again as torch.save({'generator': model.state_dict()}, ...)"
        )
    other = [str(name) for name, item in value.items() if type(item) is not Tensor]
    if other:
        raise CheckpointError(
            f"{where}: {', '.join(other[:5])}{' ...' if len(other) > 5 else ''} is no plain tensor "
            "on its own, and only such have a place among weights. Save the state dict alone"
        )
    return value


def would_run(where: str, called: str) -> CheckpointError:
    """Return the refusal of a pickle that names something to call."""
    return CheckpointError(
        f"{where} was not read: to unpickle it, {called} would have to be imported and called, and "
        "a pickle that calls what it likes can run any program on this machine; only tensors and "
        "plain containers are taken. If you know where it comes from, load it there and save "
        "nothing but the weights: torch.save({'generator': state_dict}, ...)"
    )


def _refusal(where: str, error: Exception) -> CheckpointError:
    message = str(error)
    if "weights_only" in message.lower() or "weights only" in message.lower():
        called = _CALLED.search(message)
        if called:
            return would_run(where, called[1])
    lines = [line for line in message.splitlines() if line.strip()]
    first = lines[0].strip() if lines else "no reason given"
    return CheckpointError(
        f"{where} holds no weights that can be read ({type(error).__name__}: {first[:200]}): it "
        "was cut short, is a Git LFS pointer, or was not written by torch.save with tensors and "
        "plain containers alone. Copy or download it again"
    )


# -- sources --------------------------------------------------------------------------------------


@frozen
class SafetensorsFile(WeightSource):
    """One safetensors file.

    Raises:
        CheckpointError: from ``describe`` and ``read``: it cannot be read.
    """

    file: Path

    @property
    def where(self) -> str:
        return str(self.file)

    def describe(self) -> Mapping[str, TensorInfo]:
        try:
            tensors = read_header(self.file).tensors
        except UnreadableFileError as error:
            raise self._unreadable(error) from error
        narrow = {dtype for dtype, *_ in tensors.values() if dtype.startswith("F8_")}
        unknown = {dtype for dtype, *_ in tensors.values()} - DTYPES.keys() | narrow
        if unknown:
            raise CheckpointError(
                f"{self.file} holds tensors of type {', '.join(sorted(unknown))}, which no model "
                "here has: it is quantised, so that each weight is off by some percent, and scales "
                "beside them would be lost. "
                "Take the file that it was made from"
            )
        return {
            name: TensorInfo(shape, DTYPES[dtype]) for name, (dtype, shape, *_) in tensors.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        with self._open() as stream:
            return {name: stream.get_tensor(name).clone() for name in names}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        with self._open() as stream:
            return stream.get_slice(name)[start:stop].clone()

    def _open(self) -> safe_open:
        try:
            return safe_open(self.file, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.file} is no readable safetensors file ({error}): missing, cut short, a Git LFS "
            "pointer, or another format under that name. Copy or download it again"
        )


@frozen
class RankShards(WeightSource):
    """Tensors that were cut along their first dimension, a shard a rank (FSDP2's ``Shard(0)``).

    Attributes:
        ranks: each rank's shards, in the order of the ranks; all have the same names.
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
class Joined(WeightSource):
    """Several sources as one: ``<key>.<name>`` is ``name`` of the source ``key``."""

    parts: Mapping[str, WeightSource]

    @property
    def where(self) -> str:
        return next(part.where for part in self.parts.values())

    def describe(self) -> Mapping[str, TensorInfo]:
        return {
            f"{key}.{name}": info
            for key, part in self.parts.items()
            for name, info in part.describe().items()
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


# -- names ----------------------------------------------------------------------------------------


def rename_strictly(source: WeightSource, names: ForeignNames) -> WeightSource:
    """``source`` under our names: each of its names has one of ours, and no two have the same.

    Raises:
        CheckpointError: names that are unknown, that share one of ours, or that are missing.
    """
    theirs = [name for name in source.describe() if not names.unused(name)]
    by_our_name: dict[str, str] = {}
    unknown = []
    for name in theirs:
        our_name = names.ours(name)
        if our_name is None:
            unknown.append(name)
        elif our_name in by_our_name:
            raise CheckpointError(
                f"{source.where}: {by_our_name[our_name]} and {name} are both our {our_name}; one "
                "of them would be lost. Save one model alone into the file"
            )
        else:
            by_our_name[our_name] = name
    if unknown:
        raise CheckpointError(
            f"{source.where}: {first_of(unknown)} ({len(unknown)} of {len(theirs)} names) belong "
            "to no weight of this family. All must, because a weight left out is noticed by "
            "nobody. It is a variant with layers that the family's model does not have (LoRA, "
            "sparse-attention gates, a second timestep ...), or of another family: merge the one "
            "there, or name the other"
        )
    missing = names.missing(by_our_name)
    if missing:
        raise CheckpointError(
            f"{source.where}: {first_of(missing)} ({len(missing)} names) are missing, and a module "
            "without them cannot be built. Only what is trained is in such a checkpoint, so name "
            "the folder of the whole transformer (*_inference_transformer/, transformer/)"
        )
    return Renamed(source, by_our_name)


def first_of(names: Sequence[str], most: int = 6) -> str:
    """Return the first of ``names``, and dots if there are more."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
