"""Gradients, buffers and modules of which each process may hold a shard alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from distill_protocols import ModelBundle
from distill_runtime import full_tensor, is_sharded
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

TensorT = TypeVar("TensorT", bound=Tensor)


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
