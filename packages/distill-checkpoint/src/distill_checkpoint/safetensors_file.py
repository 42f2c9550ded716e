"""Writes one safetensors file: tensor by tensor, with its checksum.

safetensors' own writers want all tensors of a file in memory at once and show nobody the bytes on
their way, so that a checksum means reading the file back.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from distill_protocols import CheckpointError, TensorInfo
from distill_runtime import DTYPE_NAMES, file_layout, raw_bytes
from torch import Tensor

from distill_checkpoint.files import FileFacts

_AHEAD = 64 << 20
"""Bytes that may be written and not hashed yet: so much is held in memory beside a tensor."""


def write_safetensors(
    path: Path,
    facts: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    *,
    offsets: Mapping[str, Sequence[int]] | None = None,
) -> FileFacts:
    """Write the new file ``path``, on the disk when this returns; holds a tensor and 64 MB.

    Args:
        facts: what goes in.
        read: gives one of them; asked for each once.
        offsets: where a tensor begins in the whole one that it is a shard of; else at 0.

    Raises:
        CheckpointError: a type that the format does not have.
        OSError: it could not be written.
    """
    unknown = sorted({str(fact.dtype) for fact in facts.values() if fact.dtype not in DTYPE_NAMES})
    if unknown:
        raise CheckpointError(
            f"{path.name}: safetensors has no type for {', '.join(unknown)}, and a checkpoint "
            "holds nothing else, because other formats can run code. Save it as another type."
        )
    begin = offsets or {}
    where = {n: {"saved_offsets": list(begin.get(n, [0] * len(f.size)))} for n, f in facts.items()}
    # What HuggingFaceStorageReader looks for, to put shards together.
    metadata = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(where)}
    names, header = file_layout(facts, metadata)
    with _HashedFile(path) as file:
        file.write(memoryview(header))
        for name in names:
            file.write(raw_bytes(read(name)))
    return file.facts


class _HashedFile:
    """A new file; its sha256 is taken beside the writing, by another thread."""

    facts: FileFacts

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._size = 0
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        self._ahead: deque[tuple[Future[None], int]] = deque()

    def write(self, view: memoryview) -> None:
        self._size += len(view)
        try:
            # One thread hashes, so in this order; the view keeps its memory.
            self._ahead.append((self._hasher.submit(self._hash.update, view), len(view)))
        except RuntimeError:
            # The interpreter ends while a save is under way: executors take nothing any more.
            self._caught_up(0)
            self._hash.update(view)
        self._caught_up(_AHEAD)
        while view:  # the system takes at most 2 GB at once
            view = view[self._file.write(view) :]

    def _caught_up(self, most: int) -> None:
        """Until at most so many bytes, or one tensor, are not hashed yet; 0: until all are."""
        while self._ahead and sum(size for _, size in self._ahead) > most:
            if len(self._ahead) == 1 and most:
                return
            self._ahead.popleft()[0].result()

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
        self.facts = FileFacts(size=self._size, sha256=self._hash.hexdigest())
