"""Tensors in safetensors files, through torch.distributed.checkpoint.

Its safetensors storage with ``save_distributed=True`` writes only ``shard-*-model-*.safetensors``:
no ``.metadata`` (the default storage's is a pickle) and no index; names, shapes and each shard's
offsets stand in the safetensors headers. So any number of ranks can read what any other wrote.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from attrs import frozen
from distill_protocols import CheckpointError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

SHARD_BYTES = 2 * 1024**3
"""Largest file, as safetensors files are built in memory before they are written."""


@frozen
class TensorShape:
    """What a stored tensor is, without its numbers."""

    size: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{list(self.size)} {str(self.dtype).removeprefix('torch.')}"


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write ``tensors`` into the new ``folder``, fsynced.

    Raises:
        CheckpointError: it did not work (disk full ...), with the reason.
    """
    folder.mkdir(parents=True)
    if not tensors:
        return
    plain = _separate(tensors)
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_file_of(plain, shard_bytes), save_distributed=True
    )
    try:
        with warnings.catch_warnings():
            # It warns that one process saves alone, which is so by intent.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save(dict(plain), storage_writer=writer, no_dist=True)
    except CheckpointException as error:  # a BaseException: `except Exception` misses it
        raise CheckpointError(f"{folder}: could not be written: {_cause(error)}") from error


def stored_tensors(folder: Path) -> dict[str, TensorShape]:
    """What is in ``folder``, by name, from the headers."""
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {
        name: TensorShape(tuple(entry.size), entry.properties.dtype)  # type: ignore[union-attr]
        for name, entry in metadata.state_dict_metadata.items()
    }


def read_into(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill ``tensors`` in place with what is stored under their names.

    Raises:
        CheckpointError: a name is not there, or of another size.
    """
    if not tensors:
        return
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: could not be read: {_cause(error)}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Everything that is stored in ``folder``, on the CPU."""
    tensors = {
        name: torch.empty(shape.size, dtype=shape.dtype)
        for name, shape in stored_tensors(folder).items()
    }
    read_into(folder, tensors)
    return tensors


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory with each other: safetensors takes only such."""
    used: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().contiguous()
        storage = own.untyped_storage().data_ptr()
        if storage in used and own.numel():
            own = own.clone()
        used.add(storage)
        separate[name] = own
    return separate


def _file_of(tensors: Mapping[str, Tensor], shard_bytes: int) -> dict[str, int]:
    """name -> number of its file, from 1; a file holds at most ``shard_bytes``, or one tensor."""
    number, filled = 1, 0
    files: dict[str, int] = {}
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > shard_bytes:
            number, filled = number + 1, 0
        filled += tensor.nbytes
        files[name] = number
    return files


def _cause(error: CheckpointException) -> str:
    """The first rank's own error, without the traceback that torch prints into the message."""
    cause, _ = next(iter(error.failures.values()))
    return f"{type(cause).__name__}: {cause}"
