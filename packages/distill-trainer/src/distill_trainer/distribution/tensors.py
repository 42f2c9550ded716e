"""Tensors of which each process holds a shard (DTensors), beside those that it holds in full.

No import of ``torch.distributed.tensor`` (2 s) before there is one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from distill_protocols import ModelBundle
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

TensorT = TypeVar("TensorT", bound=Tensor)

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


def reshard(module: nn.Module) -> None:
    """Release the gathered weights of ``module``: its parameters are the shards again."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Compute the L2 norm of all ``gradients`` and all of their shards, equal on all processes."""
    # foreach=True: left to itself torch loops over parameters on a CPU.
    if not any(map(is_sharded, gradients)):
        return get_total_norm(gradients, foreach=True)
    # The norm of DTensors is a DTensor whose value is a partial sum: without full_tensor each rank
    # would clip by the norm of its own shards, and the weights would drift apart.
    norms = [
        full_tensor(get_total_norm(group, foreach=True)) for group in _group_by_mesh(gradients)
    ]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale the gradients of ``parameters`` in place so that their ``norm`` becomes ``max_norm``.

    They stay as they are where it is no larger.
    """
    parameters = list(parameters)
    groups = [parameters]
    if any(map(is_sharded, parameters)):
        groups = _group_by_mesh([p for p in parameters if p.grad is not None])
    for group in groups:
        clip_grads_with_norm_(group, max_norm, norm, foreach=True)


def _group_by_mesh(tensors: Iterable[TensorT]) -> list[list[TensorT]]:
    """Make lists of which one foreach call takes all: plain tensors, or shards of one mesh."""
    groups: dict[object, list[TensorT]] = {}
    for value in tensors:
        key = (value.device_mesh, value.placements) if is_sharded(value) else None  # type: ignore[attr-defined]
        groups.setdefault(key, []).append(value)
    return list(groups.values())


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


def read_buffer(module: nn.Module, name: str) -> Tensor:
    """Return the buffer ``name`` of ``module`` as it is now, without gradient."""
    # Looked up each time: a module may put a new tensor into its buffer's place.
    return module.get_buffer(name).detach()


def persistent_buffers(bundle: ModelBundle) -> list[tuple[nn.Module, str]]:
    """List the buffers of trainable roles that a checkpoint holds (batch norm and the like).

    Returns:
        Pairs of the submodule that has the buffer and its name there, for ``read_buffer``.
    """
    buffers = []
    for role in bundle.roles.values():
        for module in role.modules.values() if role.trainable else ():
            saved = {id(value) for value in module.state_dict(keep_vars=True).values()}
            buffers += [
                (part, name)
                for part in module.modules()
                for name, buffer in part.named_buffers(recurse=False)
                if id(buffer) in saved
            ]
    return buffers
