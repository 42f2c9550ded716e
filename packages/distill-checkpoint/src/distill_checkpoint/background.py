"""A save that goes on beside the training.

Not ``torch.distributed.checkpoint.async_save``: its future is over when one state's files are
written, and a checkpoint here is many states, then a manifest, then a rename.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from attrs import define, field
from torch import Tensor

from distill_checkpoint.capture import Snapshot
from distill_checkpoint.tensors import Share


@define(eq=False)
class Background:
    """One job at a time, on a thread of its own; what it raises is raised to whoever waits."""

    _thread: threading.Thread | None = None
    _error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a job is over, with an error that nobody has heard of yet."""
        return self._error is not None and not self._running

    def start(self, job: Callable[[], object]) -> None:
        """After ``wait``."""
        assert self._thread is None

        def run() -> None:
            try:
                job()
            except BaseException as error:  # a KeyboardInterrupt goes to the main thread
                self._error = error

        # Not a daemon: a process that ends waits for it.
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until no job is under way.

        Raises:
            BaseException: what the job raised, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def _running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()


@define(eq=False)
class Buffers:
    """CPU memory that the tensors of one save after another are copied into."""

    _kept: dict[tuple[Path, str], Tensor] = field(factory=dict)

    def copied(self, snapshot: Snapshot) -> Snapshot:
        """``snapshot`` with tensors that training does not change. Only one copy is good at once.

        What it does not have any more is given back.
        """
        before, self._kept = self._kept, {}

        def copy(shares: dict[Path, Share]) -> dict[Path, Share]:
            return {
                path: Share(
                    {n: self._copy((path, n), t, before) for n, t in share.local.items()},
                    share.items,
                )
                for path, share in shares.items()
            }

        result = Snapshot(
            snapshot.iteration, snapshot.documents, copy(snapshot.own), copy(snapshot.shared)
        )
        shares = [*snapshot.own.values(), *snapshot.shared.values()]
        if any(tensor.is_cuda for share in shares for tensor in share.local.values()):
            torch.cuda.synchronize()  # copies to pinned memory were only asked for
        return result

    @torch.no_grad()
    def _copy(
        self, key: tuple[Path, str], tensor: Tensor, before: dict[tuple[Path, str], Tensor]
    ) -> Tensor:
        buffer = before.pop(key, None)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        self._kept[key] = buffer
        return buffer
