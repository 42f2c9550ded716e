"""Tensors of which each process holds a shard (DTensors), beside those that it holds in full.

No import of ``torch.distributed.tensor`` (2 s) before there is one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_NEVER_SHARDED = (Tensor, nn.Parameter)
"""Exact types, which are recognised without an import."""


def is_sharded(value: Tensor) -> bool:
    """Tell whether this process holds only a shard of ``value``."""
    if type(value) in _NEVER_SHARDED:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def local_shard(value: Tensor) -> Tensor:
    """Return what this process holds of ``value``: the memory itself, no copy, without gradient."""
    # Not to be cached by callers: FSDP may exchange the memory until the first forward call.
    if not is_sharded(value):
        return value
    # Under no_grad to_local skips its autograd bookkeeping, which costs more than an average does.
    with torch.no_grad():
        return value.to_local()  # type: ignore[attr-defined]


def full_tensor(value: Tensor) -> Tensor:
    """Gather all of ``value``, which all processes of its mesh must do alike; return a plain tensor
    as it is."""
    return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]


def fetch_floats(values: Sequence[Tensor | float]) -> list[float]:
    """Fetch 0-d tensors as Python floats, in order, with one wait for each device.

    Of a DTensor the shard on this rank is taken: perhaps only one rank asks.
    """
    values = [local_shard(value) if isinstance(value, Tensor) else value for value in values]
    result = [0.0] * len(values)
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = defaultdict(list)
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            by_device[value.device].append((index, value))
        else:
            result[index] = float(value)
    for entries in by_device.values():
        stacked = torch.stack([value.detach().double() for _, value in entries])
        for (index, _), number in zip(entries, stacked.tolist(), strict=True):
            result[index] = number
    return result
