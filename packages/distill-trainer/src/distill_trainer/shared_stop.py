"""One stop flag a run, shared by all of its ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from distill_protocols import DistillMethod, StopFlag
from torch import distributed

_REASON_BYTES = 256


@contextlib.contextmanager
def stop_flag_of(method: DistillMethod[Any]) -> Iterator[None]:
    """Within: ``method.stop`` is a new flag of this run alone; after: the former one.

    Where torch.distributed has more than one rank, they agree over a gloo group of their own: its
    questions are asked between others' collectives, must not wait for an accelerator, and must
    not be taken for someone else's message. All ranks must enter.
    """
    former = method.stop
    with _agreement() as agree:
        method.stop = StopFlag(agree)
        try:
            yield
        finally:
            method.stop = former


@contextlib.contextmanager
def _agreement() -> Iterator[Any]:
    if not (distributed.is_available() and distributed.is_initialized()):
        yield None
        return
    if distributed.get_world_size() == 1:
        yield None
        return
    # All ranks are in it, so that it is never torch's number for "not yours".
    group = cast(distributed.ProcessGroup, distributed.new_group(backend="gloo"))
    try:
        yield partial(_agreed_reason, group)
    finally:
        distributed.destroy_process_group(group)


def _agreed_reason(group: distributed.ProcessGroup, own: str | None) -> str | None:
    """The reason of the first rank that has one, with its number; the same on all ranks."""
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    first = torch.tensor(ranks if own is None else rank)
    distributed.all_reduce(first, distributed.ReduceOp.MIN, group=group)
    source = int(first)
    if source == ranks:
        return None
    text = torch.zeros(_REASON_BYTES, dtype=torch.uint8)
    if source == rank:
        reason = f"{own} (rank {rank})".encode()[:_REASON_BYTES]
        text[: len(reason)] = torch.frombuffer(bytearray(reason), dtype=torch.uint8)
    distributed.broadcast(text, group=group, group_src=source)
    # "ignore": the cut may have gone through a letter.
    return bytes(text.tolist()).rstrip(b"\0").decode(errors="ignore")
