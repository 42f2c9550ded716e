"""Tensors in safetensors files, through torch.distributed.checkpoint.

Its safetensors storage with ``save_distributed=True`` writes only ``shard-*-model-*.safetensors``:
no ``.metadata`` (the default storage's is a pickle) and no index; names, shapes and each shard's
offsets stand in the safetensors headers. So any number of ranks can read what any other wrote.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from attrs import field, frozen
from distill_protocols import CheckpointError, TensorInfo
from distill_runtime import ALONE, Ranks
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_save_plan,
)
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from distill_checkpoint.files import FileFacts
from distill_checkpoint.safetensors_file import write_safetensors

SHARD_BYTES = 512 * 1024**2
"""Largest file, unless one tensor is larger: a reader maps a file at a time, and checks whole files
for damage before it takes a tensor of them."""


MAPPED_BYTES = 32 * 1024**2
"""How much of a file is copied before it is unmapped."""


@frozen(eq=False)
class Share:
    """This rank's part of named tensors: a plain one whole, of a DTensor its own shard.

    Attributes:
        local: by name, plain tensors.
        items: what of the whole each of them is, as torch.distributed.checkpoint says it.
    """

    local: Mapping[str, Tensor]
    items: tuple[WriteItem, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Share:
        """Not copies: they change as training goes on."""
        detached = {name: tensor.detach() for name, tensor in tensors.items()}
        plan = create_default_local_save_plan(detached, is_coordinator=True)
        return cls({name: to_local(tensor) for name, tensor in detached.items()}, tuple(plan.items))


def to_local(tensor: Tensor) -> Tensor:
    """A DTensor's own shard; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, for which every rank of its mesh must ask; any other as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    # Parts that wait in host memory are sent from where the mesh's devices are.
    moved = tensor.to(tensor.device_mesh.device_type)
    assert isinstance(moved, DTensor)
    return moved.full_tensor()


def write_tensors(
    folder: Path,
    tensors: Share | Mapping[str, Tensor],
    *,
    ranks: Ranks = ALONE,
    shard_bytes: int = SHARD_BYTES,
) -> dict[Path, FileFacts]:
    """Write tensors into the new ``folder``, fsynced; says which files this rank wrote.

    Args:
        ranks: all of them call this together: shards go out from their owners, and what every
            rank has alike from one of them.

    Raises:
        CheckpointError: it did not work (disk full ...) on some rank, with the reason.
    """
    share = tensors if isinstance(tensors, Share) else Share.of(tensors)
    if not share.local:  # on every rank, as they hold the same names
        return {}
    files = _file_of(share.items, shard_bytes)
    written: dict[Path, FileFacts] = {}
    if ranks.group is None:
        with _as_checkpoint_error(folder):
            folder.mkdir(parents=True)
            written |= _write_share(folder, share.items, share.local, files, rank=0)
        return written
    planned = _PlannedWriter(folder, files)
    ranks.barrier()  # torch's errors and time-outs do not say which rank it was
    try:
        with ranks.within_timeout():
            save(
                dict(share.local),
                storage_writer=planned,
                planner=_SharePlanner(share),
                process_group=ranks.group,
            )
    except CheckpointException as error:  # a BaseException: `except Exception` misses it
        raise CheckpointError(f"{folder}: could not be written: {_cause(error)}") from error

    def write() -> None:
        with _as_checkpoint_error(folder):
            written.update(_write_share(folder, planned.items, share.local, files, rank=ranks.rank))

    ranks.gather_results(write)
    return written


@contextlib.contextmanager
def _as_checkpoint_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be written: {error}") from error


@frozen(eq=False)
class StoredTensors:
    """What lies in one folder; a folder that is not there holds nothing.

    Headers are read once, on first use; numbers when asked for.
    """

    folder: Path
    _kept: dict[str, Metadata] = field(init=False, factory=dict)
    _facts: dict[str, TensorInfo] = field(init=False, factory=dict)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """By name, whole tensors, however many shards there are.

        Raises:
            CheckpointError: a header cannot be read.
        """
        metadata = self._metadata
        if not self._facts:
            self._facts.update(
                {
                    name: TensorInfo(tuple(entry.size), entry.properties.dtype)  # type: ignore[union-attr]
                    for name, entry in metadata.state_dict_metadata.items()
                }
            )
        return self._facts

    def files_of(self, names: Iterable[str]) -> set[Path]:
        """The files that hold any part of ``names``."""
        return {Path(file) for name in names for _, file in self._pieces(name)}

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill ``tensors`` in place with what is stored under their names; of a DTensor its shard.

        Memory: no more than theirs, as files are mapped and copied from.

        Raises:
            CheckpointError: a name is not there, or of another size.
        """
        if not tensors:
            return
        reader = _Reader(self.folder, self._metadata)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        detached = {name: tensor.detach() for name, tensor in tensors.items()}
        try:
            with _quiet(), torch.no_grad():
                # Each rank reads what it needs: there is nothing to agree on.
                load(detached, storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise CheckpointError(f"{self.folder}: could not be read: {_cause(error)}") from error

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of ``names``, whole, on the CPU."""
        facts = self.infos
        tensors = {n: torch.empty(facts[n].size, dtype=facts[n].dtype) for n in names}
        self.read_into(tensors)
        return tensors

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """``[start:stop]`` of the first dimension of ``name``, on the CPU; maps nothing else."""
        facts = self.infos[name]
        start, stop, _ = slice(start, stop).indices(facts.size[0])
        rows = torch.empty((max(0, stop - start), *facts.size[1:]), dtype=facts.dtype)
        for chunk, file in self._pieces(name):
            offset = chunk.offsets[0]
            first, last = max(start, offset), min(stop, offset + chunk.sizes[0])
            if first < last:
                ends = zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
                box = (slice(first - start, last - start), *(slice(o, o + s) for o, s in ends))
                with safe_open(file, framework="pt") as stream:
                    rows[box] = stream.get_slice(name)[first - offset : last - offset]
        return rows

    def _pieces(self, name: str) -> Iterator[tuple[ChunkStorageMetadata, str]]:
        """Where each part of ``name`` lies."""
        for chunk in self._metadata.state_dict_metadata[name].chunks:  # type: ignore[union-attr]
            info = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            yield chunk, info.relative_path

    @property
    def _metadata(self) -> Metadata:
        if "metadata" not in self._kept:
            if not self.folder.is_dir():
                return Metadata(state_dict_metadata={}, storage_data={})
            try:
                reader = HuggingFaceStorageReader(str(self.folder))
                self._kept["metadata"] = reader.read_metadata()
            except (OSError, SafetensorError, ValueError, LookupError) as error:
                raise CheckpointError(
                    f"{self.folder}: a header cannot be read ({type(error).__name__}: {error}), so "
                    "the file is damaged. Use another checkpoint."
                ) from error
        return self._kept["metadata"]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Everything that is stored in ``folder``, on the CPU."""
    stored = StoredTensors(folder)
    return stored.read(stored.infos)


class _SharePlanner(DefaultSavePlanner):
    """Plans a ``Share`` that may be a copy: the shards of a DTensor without the DTensor."""

    def __init__(self, share: Share) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._share = share

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(list(self._share.items))
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._share.local[index.fqn]


class _PlannedWriter(HuggingFaceStorageWriter):
    """Takes torch's plan of who writes what, and leaves the writing to us: torch's builds a file in
    memory first, and takes no checksum."""

    def __init__(self, folder: Path, files: Mapping[str, int]) -> None:
        super().__init__(str(folder), fqn_to_index_mapping=dict(files), save_distributed=True)
        self.items: list[WriteItem] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.items = list(plan.items)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


def _write_share(
    folder: Path,
    items: Iterable[WriteItem],
    local: Mapping[str, Tensor],
    files: Mapping[str, int],
    *,
    rank: int,
) -> dict[Path, FileFacts]:
    by_file: dict[int, list[WriteItem]] = {}
    for item in items:
        by_file.setdefault(files[item.index.fqn], []).append(item)
    written = {}
    for number, parts in sorted(by_file.items()):
        path = folder / shard_name(rank, number, max(files.values()))
        facts = {p.index.fqn: TensorInfo(tuple(_chunk(p).sizes), _dtype(p)) for p in parts}
        offsets = {p.index.fqn: tuple(_chunk(p).offsets) for p in parts}
        written[path] = write_safetensors(path, facts, local.__getitem__, offsets=offsets)
    return written


def shard_name(rank: int, number: int, count: int) -> str:
    """As torch names file ``number`` of ``count`` of one rank; ranks count from 0 here."""
    return f"shard-{rank + 1:05d}-model-{number:05d}-of-{count:05d}.safetensors"


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None  # it is for what is no tensor only
    return item.tensor_data.chunk


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype


class _Reader(HuggingFaceStorageReader):
    """Reads with headers that were read before, and maps no more of a file than it copies next."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(str(folder))
        self._known = metadata

    def read_metadata(self) -> Metadata:
        return self._known

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, deque[ReadItem]] = {}
        for item in plan.items:
            path = self._known.storage_data[item.storage_index].relative_path
            by_file.setdefault(path, deque()).append(item)
        for path, items in by_file.items():
            while items:
                _read_some(path, items, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _read_some(path: str, items: deque[ReadItem], planner: LoadPlanner) -> None:
    """Take and copy the first ``MAPPED_BYTES`` of ``items``, or one. Then the file is unmapped:
    pages of it that were touched count as this process's memory until then."""
    copied = 0
    with safe_open(path, framework="pt") as file:
        while items and copied < MAPPED_BYTES:
            item = items.popleft()
            ends = zip(item.storage_offsets, item.lengths, strict=True)
            part = tuple(slice(begin, begin + length) for begin, length in ends)
            value = file.get_slice(item.storage_index.fqn)[part]
            target = planner.resolve_tensor(item).detach()
            if target.size() != value.size():
                raise CheckpointError(f"{item.storage_index.fqn} is not the size that it was")
            target.copy_(value)
            planner.commit_tensor(item, target)
            copied += value.nbytes


def _file_of(items: Iterable[WriteItem], shard_bytes: int) -> dict[str, int]:
    """name -> number of its file, from 1; a file holds at most ``shard_bytes``, or one tensor.

    By the sizes of whole tensors, so that all ranks come to the same numbers.
    """
    number, filled = 1, 0
    files: dict[str, int] = {}
    for item in items:
        assert item.tensor_data is not None
        size = TensorInfo(tuple(item.tensor_data.size), _dtype(item)).nbytes
        if filled and filled + size > shard_bytes:
            number, filled = number + 1, 0
        filled += size
        files[item.index.fqn] = number
    return files


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # It warns that one process saves alone, which is so by intent.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: CheckpointException) -> str:
    """The first failing rank's own error, without torch's traceback in the message."""
    rank, (cause, _) = next(iter(sorted(error.failures.items())))
    who = f"rank {rank}: " if len(error.failures) > 1 or rank else ""
    return f"{who}{type(cause).__name__}: {cause}"
