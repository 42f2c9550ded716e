"""safetensors files, written tensor by tensor.

safetensors' own writers take all tensors of a file at once, so whoever saves a model needs it in
memory a second time. The format (huggingface.co/docs/safetensors) is eight bytes of header length,
a JSON header and the tensors' bytes after each other: who knows the shapes can write as he reads.

Tensors begin at multiples of 64 bytes, as in memory that torch allocates. Readers map the file and
compute on it there, and a CPU's matrix product of weights that lie otherwise differs in its last
bits (files of ``save_file``, at multiples of 8, gave other clips than the trainer).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from distill_protocols import ContractError, TensorInfo
from torch import Tensor

from distill_runtime.files import FileInfo

DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64",
    torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What the format can hold, by its own names."""

DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}
"""The other direction: a header's type -> torch's."""

ALIGNMENT = 64

_AHEAD = 64 << 20
"""Bytes that may be written and not hashed yet: so much is held in memory beside a tensor."""


def write_safetensors(
    file: Path,
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> FileInfo:
    """Write the new file ``file``, on the disk when this returns; hold one tensor and 64 MB.

    Args:
        infos: what goes in, by its name in the file; every dtype is in ``DTYPE_NAMES``.
        read: gives one of them on the CPU, as ``infos`` states; asked for each once.
        metadata: of the header, besides ``{"format": "pt"}``, by which readers know torch's.

    Raises:
        ContractError: a dtype that the format does not have, or ``read`` gives something else
            than ``infos`` states.
        OSError: it could not be written.
    """
    unknown = sorted({str(info.dtype) for info in infos.values() if info.dtype not in DTYPE_NAMES})
    if unknown:
        raise ContractError(
            f"{file.name}: safetensors has no type for {', '.join(unknown)}, and nothing else is "
            "written, because other formats can run code. Save it as another type"
        )
    order, header = file_layout(infos, metadata)
    with _HashedFile(file) as hashed:
        hashed.write(memoryview(header))
        for name in order:
            tensor = read(name)
            given = TensorInfo(tuple(tensor.shape), tensor.dtype)
            if given != infos[name]:
                raise ContractError(
                    f"{name} is {given}, but its source described {infos[name]}; what is written "
                    "would not be what the header states. WeightSource.describe and read must agree"
                )
            hashed.write(raw_bytes(tensor))
    return hashed.info


class _HashedFile:
    """A new file; its sha256 is taken beside the writing, by another thread."""

    info: FileInfo

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._size = 0
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._ahead: deque[tuple[Future[None], int]] = deque()
        self._ahead_size = 0
        """Bytes in ``_ahead``, counted once each: there may be thousands of small tensors."""

    def write(self, view: memoryview) -> None:
        self._size += len(view)
        try:
            # One thread hashes, so in this order; the view keeps its memory.
            self._ahead.append((self._hasher.submit(self._hash.update, view), len(view)))
            self._ahead_size += len(view)
        except RuntimeError:
            # The interpreter ends while a save is under way: executors take nothing any more.
            self._wait_for_hash(0)
            self._hash.update(view)
        self._wait_for_hash(_AHEAD)
        while view:  # the system takes at most 2 GB at once
            view = view[self._file.write(view) :]

    def _wait_for_hash(self, most: int) -> None:
        """Until at most so many bytes, or one tensor, are not hashed yet; 0: until all are."""
        while self._ahead and self._ahead_size > most:
            if len(self._ahead) == 1 and most:
                return
            hashed, size = self._ahead.popleft()
            hashed.result()
            self._ahead_size -= size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with self._file:
                if error is None:
                    os.fsync(self._file.fileno())
        finally:
            self._hasher.shutdown()
        self.info = FileInfo(size=self._size, sha256=self._hash.hexdigest())


def file_layout(
    infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[tuple[str, ...], bytes]:
    """Return the order of the tensors in the file, and everything that stands before the first.

    Args:
        infos: what goes in; every dtype is in ``DTYPE_NAMES``.
        metadata: of the header, besides ``{"format": "pt"}``, by which readers know torch's.
    """

    def place(name: str) -> tuple[bool, int, str]:
        # The format has no gaps, so what would push the others aside comes last, the widest type
        # first, so that none begins within a number. (Of a real Wan nothing is pushed aside.)
        info = infos[name]
        return info.nbytes % ALIGNMENT != 0, -info.dtype.itemsize, name

    order = tuple(sorted(infos, key=place))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        begin, end = end, end + infos[name].nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[infos[name].dtype],
            "shape": list(infos[name].size),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return order, len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the numbers of a tensor as they lie in memory, on the CPU; no copy of one that is
    there."""
    value = tensor.detach().cpu().contiguous()
    if not value.nbytes:
        return memoryview(b"")
    # Not through numpy, which torch does not bring, and which has no bf16.
    memory: Any = (ctypes.c_char * value.nbytes).from_address(value.data_ptr())
    memory.owner = value  # as long as anyone looks at its bytes
    return memoryview(memory).cast("B")
