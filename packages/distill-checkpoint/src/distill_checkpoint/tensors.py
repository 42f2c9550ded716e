"""Tensors in safetensors files, planned and put together by torch.distributed.checkpoint (DCP).

The files are those of DCP's safetensors storage with ``save_distributed=True``:
``shard-*-model-*.safetensors`` and neither a ``.metadata`` (the default storage's is a pickle) nor
an index. Names, shapes and the place of each shard in its tensor are in the safetensors headers, so
any number of ranks can read what any other number wrote.

DCP plans who writes what, so that replicas are written once, and which part of which file fills
which part of a tensor. Writing and reading of the bytes is done here: DCP's writer builds a file in
memory first and takes no checksum, and its reader maps whole files.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from attrs import field, frozen
from distill_protocols import CheckpointError, ContractError, TensorInfo
from distill_runtime import (
    ALONE,
    DTYPES,
    FileInfo,
    Ranks,
    UnreadableFileError,
    parse_json,
    read_header,
    write_safetensors,
)
from safetensors import safe_open
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
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
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

SHARD_BYTES = 512 * 1024**2
"""Largest file, unless one tensor is larger: a reader maps a file at a time, and checks whole files
for damage before it takes a tensor of them."""

MAPPED_BYTES = 32 * 1024**2
"""How much of a file is copied before it is unmapped."""

_SHARDING = "DCP_SHARDING_INFO"
_OFFSETS = "saved_offsets"


def new_checkpoint_group(timeout: float) -> Ranks:
    """Make a group for what is written and read, beside that of the training.

    All ranks call it together.

    Args:
        timeout: seconds after which a rank that does not answer is given up.
    """
    return Ranks.of_this_run(
        timeout,
        error=CheckpointError,
        advice="; for slow storage, raise timeout_seconds",
    )


# -- tensors of this rank -------------------------------------------------------------------------


@frozen(eq=False)
class LocalShard:
    """What this rank has of named tensors: of a DTensor its own shard, any other in full.

    Attributes:
        local: by name, plain tensors.
        items: what part of the full tensor each of them is, as DCP describes it.
    """

    local: Mapping[str, Tensor]
    items: tuple[WriteItem, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> LocalShard:
        """Take the shards of ``tensors``. They are not copied, so training still changes them."""
        detached = {name: tensor.detach() for name, tensor in tensors.items()}
        plan = create_default_local_save_plan(detached, is_coordinator=True)
        return cls({name: to_local(tensor) for name, tensor in detached.items()}, tuple(plan.items))


def to_local(tensor: Tensor) -> Tensor:
    """Return a DTensor's own shard; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def to_full(tensor: Tensor) -> Tensor:
    """Gather a DTensor, for which every rank of its mesh must call it; any other as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    # The mesh's backend (nccl) sends from its own devices only; shards may be in host memory.
    moved = tensor.to(tensor.device_mesh.device_type)
    assert isinstance(moved, DTensor)
    return moved.full_tensor()


# -- writing --------------------------------------------------------------------------------------


def write_tensors(
    folder: Path,
    tensors: LocalShard | Mapping[str, Tensor],
    *,
    ranks: Ranks = ALONE,
    shard_bytes: int = SHARD_BYTES,
) -> dict[Path, FileInfo]:
    """Write tensors into the new ``folder``; their bytes are on the disk when this returns.

    Args:
        ranks: all of them call this together: shards are written by their owners, and what every
            rank has alike by one of them.

    Returns:
        The files that this rank wrote.

    Raises:
        CheckpointError: it did not work (disk full ...) on some rank, with the reason.
    """
    shard = tensors if isinstance(tensors, LocalShard) else LocalShard.of(tensors)
    if not shard.local:  # on every rank, as they hold the same names
        return {}
    files = _file_numbers(shard.items, shard_bytes)
    if ranks.group is None:
        with _as_checkpoint_error(folder):
            folder.mkdir(parents=True)
            return _write_items(folder, shard.items, shard.local, files, rank=0)
    # `save` only plans: it makes `folder`, and leaves this rank's part in `planned.items`.
    planned = _PlannedWriter(folder, files)
    # `save` is a chain of collectives in torch, whose errors and time-outs do not say which rank
    # it was that did not come; the barrier does.
    ranks.barrier()
    try:
        with ranks.within_timeout():
            save(
                dict(shard.local),
                storage_writer=planned,
                planner=_ShardPlanner(shard),
                process_group=ranks.group,
            )
    except CheckpointException as error:  # a BaseException: `except Exception` misses it
        raise CheckpointError(f"{folder}: could not be written: {_first_cause(error)}") from error

    written: dict[Path, FileInfo] = {}

    def write() -> None:
        with _as_checkpoint_error(folder):
            written.update(_write_items(folder, planned.items, shard.local, files, rank=ranks.rank))

    # Outside of `save`, which turns a full disk into an exception of torch without its reason; here
    # every rank raises a CheckpointError that names it.
    ranks.run_each(write)
    return written


def shard_name(rank: int, number: int, count: int) -> str:
    """As DCP names file ``number`` of ``count`` of one rank; ranks count from 0 here."""
    return f"shard-{rank + 1:05d}-model-{number:05d}-of-{count:05d}.safetensors"


def sharding_metadata(offsets: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What DCP puts into the header of a file, to put shards together again.

    Args:
        offsets: by name, where the tensor in the file begins in the full one.
    """
    places = {name: {_OFFSETS: list(place)} for name, place in offsets.items()}
    return {"DCP_VERSION": "1.0", _SHARDING: json.dumps(places)}


class _ShardPlanner(DefaultSavePlanner):
    """Plans a ``LocalShard`` that may be a copy: the shards of a DTensor without the DTensor."""

    def __init__(self, shard: LocalShard) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shard = shard

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(list(self._shard.items))
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._shard.local[index.fqn]


class _PlannedWriter(HuggingFaceStorageWriter):
    """Takes DCP's plan of who writes what, and writes nothing itself."""

    def __init__(self, folder: Path, files: Mapping[str, int]) -> None:
        super().__init__(str(folder), fqn_to_index_mapping=dict(files), save_distributed=True)
        self.items: list[WriteItem] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        self.items = list(plan.items)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


def _write_items(
    folder: Path,
    items: Iterable[WriteItem],
    local: Mapping[str, Tensor],
    files: Mapping[str, int],
    *,
    rank: int,
) -> dict[Path, FileInfo]:
    """Write this rank's ``items``, each into the file that ``files`` names."""
    by_file: dict[int, list[WriteItem]] = {}
    for item in items:
        by_file.setdefault(files[item.index.fqn], []).append(item)
    written = {}
    for number, parts in sorted(by_file.items()):
        infos, offsets = {}, {}
        for part in parts:
            assert part.tensor_data is not None  # None is for what is no tensor
            chunk = part.tensor_data.chunk
            infos[part.index.fqn] = TensorInfo(
                tuple(chunk.sizes), part.tensor_data.properties.dtype
            )
            offsets[part.index.fqn] = tuple(chunk.offsets)
        path = folder / shard_name(rank, number, max(files.values()))
        written[path] = write_safetensors(
            path, infos, local.__getitem__, metadata=sharding_metadata(offsets)
        )
    return written


def _file_numbers(items: Iterable[WriteItem], shard_bytes: int) -> dict[str, int]:
    """Number the file of each tensor, from 1; a file holds ``shard_bytes`` at most, or one tensor.

    By the sizes of full tensors, so that all ranks come to the same numbers.
    """
    number, filled = 1, 0
    files: dict[str, int] = {}
    for item in items:
        assert item.tensor_data is not None
        info = TensorInfo(tuple(item.tensor_data.size), item.tensor_data.properties.dtype)
        if filled and filled + info.nbytes > shard_bytes:
            number, filled = number + 1, 0
        filled += info.nbytes
        files[item.index.fqn] = number
    return files


@contextlib.contextmanager
def _as_checkpoint_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ContractError) as error:
        raise CheckpointError(f"{folder}: could not be written: {error}") from error


def _first_cause(error: CheckpointException) -> str:
    """Return the first failing rank's own error, without torch's traceback in the message."""
    rank, (cause, _) = next(iter(sorted(error.failures.items())))
    who = f"rank {rank}: " if len(error.failures) > 1 or rank else ""
    return f"{who}{type(cause).__name__}: {cause}"


# -- reading --------------------------------------------------------------------------------------


@frozen
class _Piece:
    """A part of a tensor, which is a tensor of that name in one file."""

    file: Path
    offsets: tuple[int, ...]
    info: TensorInfo


@frozen(eq=False)
class StoredTensors:
    """The tensors in one folder; a folder that is not there holds none.

    Headers are read once, on first use; numbers when asked for.
    """

    folder: Path
    _headers: dict[str, list[_Piece]] = field(init=False, factory=dict)

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """By name, full tensors, however many shards there are.

        Raises:
            CheckpointError: a header cannot be read.
        """
        return {name: _full_info(pieces) for name, pieces in self._pieces().items()}

    def files_of(self, names: Iterable[str]) -> set[Path]:
        """Return the files that hold any part of ``names``."""
        return {piece.file for name in names for piece in self._pieces_of(name)}

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill ``tensors`` in place with what is stored under their names; of a DTensor its shard.

        Memory: no more than theirs, as files are mapped and copied from.

        Raises:
            CheckpointError: a name is not there, or of another size.
            KeyboardInterrupt: Ctrl-C, as it came.
        """
        if not tensors:
            return
        reader = _Reader(self.folder, self._pieces())
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        detached = {name: tensor.detach() for name, tensor in tensors.items()}
        try:
            with warnings.catch_warnings(), torch.no_grad():
                # It warns that one process loads alone, which is so by intent: each rank reads what
                # it needs of files that all of them see, so there is nothing to agree on.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(detached, storage_reader=reader, planner=planner, no_dist=True)
        except CheckpointException as error:
            for cause, _ in error.failures.values():
                # torch wraps whatever comes up while it reads, a Ctrl-C too.
                if isinstance(cause, KeyboardInterrupt):
                    raise cause from None
            cause = _first_cause(error)
            raise CheckpointError(f"{self.folder}: could not be read: {cause}") from error

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the full tensors of ``names`` on the CPU.

        Raises:
            CheckpointError: a name is not there.
        """
        infos = {n: _full_info(self._pieces_of(n)) for n in names}
        tensors = {n: torch.empty(info.size, dtype=info.dtype) for n, info in infos.items()}
        self.read_into(tensors)
        return tensors

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """``[start:stop]`` of the first dimension of ``name``, on the CPU; maps nothing else."""
        pieces = self._pieces_of(name)
        info = _full_info(pieces)
        start, stop, _ = slice(start, stop).indices(info.size[0])
        rows = torch.empty((max(0, stop - start), *info.size[1:]), dtype=info.dtype)
        for piece in pieces:
            (offset, *offsets), (length, *lengths) = piece.offsets, piece.info.size
            first, last = max(start, offset), min(stop, offset + length)
            if first < last:
                ends = zip(offsets, lengths, strict=True)
                box = (slice(first - start, last - start), *(slice(o, o + n) for o, n in ends))
                with safe_open(piece.file, framework="pt") as stream:
                    rows[box] = stream.get_slice(name)[first - offset : last - offset]
        return rows

    def _pieces_of(self, name: str) -> list[_Piece]:
        if name not in self._pieces():
            raise CheckpointError(
                f"{self.folder} holds no tensor {name!r}: the folder was deleted or changed since "
                "it was opened. Take another checkpoint of the run."
            )
        return self._pieces()[name]

    def _pieces(self) -> Mapping[str, list[_Piece]]:
        if not self._headers and self.folder.is_dir():
            pieces: dict[str, list[_Piece]] = {}
            try:
                for file in sorted(self.folder.glob("*.safetensors")):
                    for name, piece in _read_pieces(file):
                        first = pieces.setdefault(name, [piece])[0]
                        if first is not piece:
                            pieces[name].append(piece)
                        if _kind(first) != _kind(piece):
                            raise UnreadableFileError(
                                f"{name} is {piece.info} in {file} and {first.info} in {first.file}"
                            )
            except (OSError, UnreadableFileError) as error:
                raise CheckpointError(
                    f"{self.folder}: a header cannot be read ({error}), so the file is damaged. "
                    "Use another checkpoint."
                ) from error
            self._headers.update(pieces)
        return self._headers


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Everything that is stored in ``folder``, in full, on the CPU."""
    stored = StoredTensors(folder)
    return stored.read(stored.infos)


def _kind(piece: _Piece) -> tuple[torch.dtype, int]:
    return piece.info.dtype, len(piece.info.size)


def _full_info(pieces: list[_Piece]) -> TensorInfo:
    ends = [
        [start + length for start, length in zip(piece.offsets, piece.info.size, strict=True)]
        for piece in pieces
    ]
    return TensorInfo(tuple(map(max, zip(*ends, strict=True))), pieces[0].info.dtype)


def _read_pieces(file: Path) -> Iterator[tuple[str, _Piece]]:
    """Yield the tensors of one file, and where they are in the full ones. Reads the header
    alone."""
    header = read_header(file)
    sharding = header.metadata.get(_SHARDING)
    places = None if sharding is None else parse_json(sharding, f"the sharding in {file}")
    for name, (dtype, shape, _, _) in header.tensors.items():
        try:
            offsets = (0,) * len(shape) if places is None else tuple(places[name][_OFFSETS])
            if len(offsets) != len(shape) or any(type(o) is not int or o < 0 for o in offsets):
                raise ValueError(f"{offsets} is no place of a tensor of {list(shape)}")
            yield name, _Piece(file, offsets, TensorInfo(shape, DTYPES[dtype]))
        except (LookupError, TypeError, ValueError) as error:
            raise UnreadableFileError(
                f"{file} has a damaged entry {name} ({type(error).__name__}: {error})"
            ) from error


class _Reader(HuggingFaceStorageReader):
    """Reads with headers that were read before, and maps no more of a file than it copies next."""

    def __init__(self, folder: Path, pieces: Mapping[str, list[_Piece]]) -> None:
        super().__init__(str(folder))
        self._files = {
            MetadataIndex(name, torch.Size(piece.offsets)): piece.file
            for name, parts in pieces.items()
            for piece in parts
        }
        self._metadata = Metadata(
            state_dict_metadata={
                name: TensorStorageMetadata(
                    properties=TensorProperties(dtype=parts[0].info.dtype),
                    size=torch.Size(_full_info(parts).size),
                    chunks=[
                        ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.info.size))
                        for p in parts
                    ],
                )
                for name, parts in pieces.items()
            },
            storage_data=self._files,
            storage_meta=StorageMeta(),
        )

    def read_metadata(self) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[Path, deque[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._files[item.storage_index], deque()).append(item)
        for file, items in by_file.items():
            while items:
                _copy_some(file, items, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _copy_some(file: Path, items: deque[ReadItem], planner: LoadPlanner) -> None:
    """Take and copy the first ``MAPPED_BYTES`` of ``items``, or one.

    Then the file is unmapped: pages of it that were touched count as this process's memory until
    then, so that a resume would need twice the memory of the run.
    """
    copied = 0
    with safe_open(file, framework="pt") as stream:
        while items and copied < MAPPED_BYTES:
            item = items.popleft()
            ends = zip(item.storage_offsets, item.lengths, strict=True)
            box = tuple(slice(begin, begin + length) for begin, length in ends)
            value = stream.get_slice(item.storage_index.fqn)[box]
            target = planner.resolve_tensor(item).detach()
            if target.size() != value.size():
                raise CheckpointError(f"{item.storage_index.fqn} is not the size that it was")
            target.copy_(value)
            planner.commit_tensor(item, target)
            copied += value.nbytes
