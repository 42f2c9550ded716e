"""torch.distributed.checkpoint's default storage, read without running what stands in it.

::

    .metadata          a pickle of torch's Metadata: names, sizes, and where each piece lies
    __<rank>_<n>.distcp    pieces, each a small ``.pt`` file of its own

torch unpickles the one freely, and values that are no tensors too. Here ``.metadata`` is
interpreted with stand-ins: each of the few names that a Metadata consists of is an inert record,
made anew for each file, every other name is refused, so that nothing of torch is called or touched.
Pieces are read one by one, as ``.pt`` files are (``files.load_bytes``).
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from attrs import frozen
from distill_protocols import CheckpointError, TensorInfo, WeightSource
from distill_runtime import UnreadableFileError, path_inside
from torch import Tensor

from distill_checkpoint.foreign.files import load_bytes, would_run

METADATA = ".metadata"

_DCP = "torch.distributed.checkpoint"
_RECORDS = frozenset(
    {
        (f"{_DCP}.metadata", "Metadata"),
        (f"{_DCP}.metadata", "TensorStorageMetadata"),
        (f"{_DCP}.metadata", "BytesStorageMetadata"),
        (f"{_DCP}.metadata", "ChunkStorageMetadata"),
        (f"{_DCP}.metadata", "TensorProperties"),
        (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
        (f"{_DCP}.metadata", "MetadataIndex"),
        (f"{_DCP}.metadata", "StorageMeta"),
        (f"{_DCP}.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        # The folder that it was saved to, in StorageMeta; of Python up to 3.12, and from 3.13.
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
        ("pathlib._local", "PosixPath"),
        ("pathlib._local", "WindowsPath"),
    }
)
_PLAIN: Mapping[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    **{("torch", name): dtype for name, dtype in vars(torch).items() if type(dtype) is torch.dtype},
}


@frozen
class Piece:
    """A box of a tensor, and where its numbers are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@frozen
class DcpCheckpoint(WeightSource):
    """A folder of torch.distributed.checkpoint's default storage.

    Attributes:
        folder: where it is.
        tensors: what each tensor is.
        values: names of what is no tensor.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    values: frozenset[str]
    _pieces: Mapping[str, tuple[Piece, ...]]

    @property
    def where(self) -> str:
        return str(self.folder)

    def describe(self) -> Mapping[str, TensorInfo]:
        return self.tensors

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, put together from the pieces of all ranks.

        Raises:
            CheckpointError: a piece is missing, damaged, of another size than ``.metadata`` states,
                or would call something when unpickled.
        """
        return {name: self._tensor(name) for name in names}

    def read_value(self, name: str) -> object:
        """Return one of ``values``, if it is made of plain containers and numbers.

        Raises:
            CheckpointError: it is not, or cannot be read.
        """
        return self._load(name, self._pieces[name][0])

    def _tensor(self, name: str) -> Tensor:
        info = self.tensors[name]
        tensor = torch.empty(info.size, dtype=info.dtype)
        for piece in self._pieces[name]:
            part = self._load(name, piece)
            kind = (tuple(part.shape), part.dtype) if type(part) is Tensor else type(part).__name__
            if kind != (piece.sizes, info.dtype):
                raise CheckpointError(
                    f"{self.folder / piece.file}: the piece of {name} at {list(piece.offsets)} is "
                    f"{kind}, where {METADATA} states {(piece.sizes, info.dtype)}; one of the two "
                    "files is of another checkpoint. Copy the folder again"
                )
            box = zip(piece.offsets, piece.sizes, strict=True)
            tensor[tuple(slice(start, start + size) for start, size in box)] = part
        return tensor

    def _load(self, name: str, piece: Piece) -> Any:
        try:
            file = path_inside(self.folder, piece.file, self.folder / METADATA)
        except UnreadableFileError as error:
            raise CheckpointError(f"{error}. Copy the folder again") from error
        try:
            if file.exists() and not file.is_file():
                raise OSError("it is a folder or a pipe, and no file")
            with file.open("rb") as stream:
                stream.seek(piece.start)
                content = stream.read(piece.length)
        except (OSError, OverflowError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(
                f"{file} cannot be read ({reason}), and {name} is in it. Copy the folder again, "
                "with the files of all ranks"
            ) from error
        if len(content) != piece.length:
            raise CheckpointError(
                f"{file} ends before {name} does: it was cut short. Copy the folder again"
            )
        return load_bytes(content, f"{file} ({name})")


def is_dcp(folder: Path) -> bool:
    return (folder / METADATA).is_file()


def open_dcp(folder: Path) -> DcpCheckpoint:
    """Describe a folder, without reading a tensor.

    Raises:
        CheckpointError: ``.metadata`` is missing, damaged, or names something that a Metadata does
            not consist of; or the pieces do not make up the tensors.
    """
    file = folder / METADATA
    raw = _read_metadata(file)
    try:
        return _interpret(folder, raw)
    except (_MalformedError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file} does not describe a checkpoint of torch.distributed.checkpoint: "
            f"{error}. It is damaged, or of a release with another format; copy the folder again, "
            "or save it anew with the torch that wrote it"
        ) from error


# -- the pickle -----------------------------------------------------------------------------------


class _Record:
    """Holds a pickle's description of an object, and does nothing with it.

    ``__setstate__`` also takes the BUILD instruction away from the class itself: unpickling could
    otherwise set attributes of a class that it was given.
    """

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> _Record:
        record = super().__new__(cls)
        record.arguments = arguments
        record.state = None
        return record

    def __init__(self, *arguments: object) -> None:
        """Nothing: a class is called with what ``__new__`` has kept."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ForbiddenError(Exception):
    """A pickle names something that it has no business with."""


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._classes: dict[tuple[str, str], type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        key = (module, name)
        if key in _PLAIN:
            return _PLAIN[key]
        if key not in _RECORDS:
            raise _ForbiddenError(f"{module}.{name}")
        if key not in self._classes:
            self._classes[key] = type(name, (_Record,), {})
        return self._classes[key]


def _read_metadata(file: Path) -> Any:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror or error}); torch.distributed.checkpoint "
            "writes it last, so this folder is not whole. Copy it again, or take another one"
        ) from error
    try:
        return _MetadataUnpickler(content).load()
    except _ForbiddenError as error:
        raise would_run(str(file), str(error)) from error
    except Exception as error:  # a damaged pickle raises from anywhere
        raise CheckpointError(
            f"{file} is no pickle of a checkpoint's metadata ({type(error).__name__}: {error}): it "
            "was cut short or overwritten. Copy the folder again, or take another one"
        ) from error


# -- reading the metadata --------------------------------------------------------------------------


class _MalformedError(Exception):
    """A record is not what it should be."""


def _malformed(what: str) -> NoReturn:
    raise _MalformedError(what)


def _interpret(folder: Path, raw: Any) -> DcpCheckpoint:
    body = _state(raw, "Metadata")
    entries = body["state_dict_metadata"]
    locations = {
        (index["fqn"], _ints(index.get("offset") or ())): _location(info)
        for key, info in body["storage_data"].items()
        if (index := _state(key, "MetadataIndex"))
    }
    tensors: dict[str, TensorInfo] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    for name, entry in entries.items():
        if type(name) is not str:
            _malformed(f"the name {name!r} is no string")
        if _kind(entry) == "BytesStorageMetadata":
            pieces[name] = (Piece((), (), *locations[name, ()]),)
            continue
        stored = _state(entry, "TensorStorageMetadata")
        info = TensorInfo(_ints(stored["size"]), _dtype(stored["properties"]))
        boxes = [_box(chunk) for chunk in stored["chunks"]]
        # A rank without a share of a small tensor wrote an empty piece.
        boxes = [box for box in boxes if math.prod(box[1])]
        _check_cover(name, info.size, boxes)
        tensors[name] = info
        pieces[name] = tuple(Piece(*box, *locations[name, box[0]]) for box in boxes)
    return DcpCheckpoint(folder, tensors, frozenset(entries) - frozenset(tensors), pieces)


def _kind(record: Any) -> str:
    return type(record).__name__ if isinstance(record, _Record) else ""


def _state(record: Any, kind: str) -> dict[Any, Any]:
    if _kind(record) != kind or not isinstance(record.state, dict | None):
        _malformed(f"there is a {_kind(record) or type(record).__name__} where a {kind} must be")
    return record.state or {}


def _ints(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or any(type(item) is not int or item < 0 for item in value):
        _malformed(f"{value!r} is no tuple of sizes")
    return value


def _dtype(properties: Any) -> torch.dtype:
    if _kind(properties) != "TensorProperties" or type(properties.state) is not tuple:
        _malformed("a tensor has no properties")
    dtype = properties.state[0]
    return dtype if type(dtype) is torch.dtype else _malformed(f"{dtype!r} is no dtype")


def _location(info: Any) -> tuple[str, int, int]:
    body = _state(info, "_StorageInfo")
    if body.get("transform_descriptors"):
        _malformed(
            f"its pieces are transformed ({body['transform_descriptors']}), compressed perhaps"
        )
    file = body["relative_path"]
    if type(file) is not str or Path(file).name != file:
        _malformed(f"it names the file {file!r}, which is not one of its own folder")
    start, length = _ints((body["offset"], body["length"]))
    return file, start, length


def _box(chunk: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    body = _state(chunk, "ChunkStorageMetadata")
    return _ints(body["offsets"]), _ints(body["sizes"])


def _check_cover(
    name: str, size: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    """That the boxes fill the tensor: none sticks out, no two overlap, and their volumes add up."""
    for offsets, sizes in boxes:
        ends = [start + length for start, length in zip(offsets, sizes, strict=True)]
        if len(ends) != len(size) or any(end > full for end, full in zip(ends, size, strict=True)):
            _malformed(f"a piece of {name} at {list(offsets)} sticks out of its {list(size)}")
    ordered = sorted(boxes)
    for index, (offsets, sizes) in enumerate(ordered):
        for other, others in ordered[index + 1 :]:
            if other and other[0] >= offsets[0] + sizes[0]:
                break  # sorted: all that follow begin later still
            if all(
                start < there + extent and there < start + length
                for start, length, there, extent in zip(offsets, sizes, other, others, strict=True)
            ):
                _malformed(f"pieces of {name} at {list(offsets)} and {list(other)} overlap")
    if sum(math.prod(sizes) for _, sizes in boxes) != math.prod(size):
        _malformed(f"the pieces of {name} do not make up its {list(size)}")
