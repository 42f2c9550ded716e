"""Tensors of which each process holds a part (DTensors), beside those that are whole.

No import of ``torch.distributed.tensor`` (2 s) before there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

_WHOLE = (Tensor, nn.Parameter)


def is_shard(value: Tensor) -> bool:
    """Whether this process holds a part of it only."""
    if type(value) in _WHOLE:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def local(value: Tensor) -> Tensor:
    """What this process holds of it: the memory itself, not a copy. Without gradient."""
    # Asked anew each time: FSDP may exchange it until the first forward call.
    if not is_shard(value):
        return value
    with torch.no_grad():  # the way without bookkeeping, which costs more than an average
        return value.to_local()  # type: ignore[attr-defined]


def whole(value: Tensor) -> Tensor:
    """All of it, for which all processes of its mesh must ask alike; a plain tensor as it is."""
    return value.full_tensor() if is_shard(value) else value  # type: ignore[attr-defined]


def reshard(module: nn.Module) -> None:
    """Put gathered weights of ``module`` away: its parameters are the parts again."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all of them, parts of one tensor counted together: equal on all processes."""
    # foreach=True: left to itself torch loops over parameters on a CPU.
    norms = [get_total_norm(group, foreach=True) for group in _alike(gradients)]
    norms = [whole(norm) for norm in norms]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale the gradients of ``parameters`` in place, such that ``norm`` becomes ``max_norm``.

    Nothing is done where it is no larger.
    """
    for group in _alike([p for p in parameters if p.grad is not None]):
        clip_grads_with_norm_(group, max_norm, norm, foreach=True)


def _alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """In lists of which one call of torch takes all: whole ones, or those of one mesh."""
    groups: dict[object, list[Tensor]] = {}
    for value in tensors:
        key = (value.device_mesh, value.placements) if is_shard(value) else None  # type: ignore[attr-defined]
        groups.setdefault(key, []).append(value)
    return list(groups.values())
