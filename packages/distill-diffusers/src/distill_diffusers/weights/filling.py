"""Weights into modules on the meta device: on each process what it holds, and no more.

A parameter that is a ``DTensor`` is held in parts: each process reads its own. Any other is held
whole by all processes: the first reads it and the others receive it, so that storage is read once
and all have the same numbers, whatever lies in their folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from distill_protocols import WeightsError, WeightSource
from distill_runtime import Ranks
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distill_diffusers.weights.sources import GROUP_BYTES, in_groups


def filled(
    targets: Mapping[str, Tensor],
    open_source: Callable[[], WeightSource],
    *,
    ranks: Ranks,
    home: Callable[[Tensor], torch.device],
) -> dict[str, Tensor]:
    """Tensors like ``targets``, which may be on meta, with the numbers of a source.

    Args:
        targets: names, shapes, types and placements; alike on all ranks.
        open_source: gives what has just those names and shapes. It is asked for on the first rank,
            and on another only if that holds parts.
        ranks: all of them call this together.
        home: where each is held.

    Raises:
        WeightsError: it cannot be read, by any of the ranks; the same error on all.
    """
    state = {name: torch.empty_like(t, device=home(t)) for name, t in targets.items()}
    parts = {name: t for name, t in state.items() if isinstance(t, DTensor)}
    whole = {name: t for name, t in state.items() if name not in parts}
    opened: list[WeightSource] = []
    if targets:
        ranks.run_each(lambda: opened.append(open_source()) if ranks.is_first or parts else None)
    for group in in_groups(whole, lambda name: whole[name].nbytes, GROUP_BYTES):
        held = {name: whole[name] for name in group}
        ranks.run_each(lambda held=held: _read(held, opened[0]) if ranks.is_first else None)
        with ranks.within_timeout():
            for tensor in held.values():
                _broadcast(tensor, ranks)
    if parts:
        ranks.run_each(lambda: _read_parts(parts, opened[0]))
    return state


def move_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Not ``module.to``: that would move parameters that wait on the CPU, too."""
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))


def _read(held: Mapping[str, Tensor], source: WeightSource) -> None:
    found = source.read(held)
    for name, tensor in held.items():
        tensor.copy_(found.pop(name))  # a copy: what is read may still be the mapped file


def _broadcast(tensor: Tensor, ranks: Ranks) -> None:
    if ranks.group is None:
        return
    sent = tensor.cpu()  # gloo's; the tensor itself where that is its home
    distributed.broadcast(sent, 0, group=ranks.group)
    if sent is not tensor:
        tensor.copy_(sent)


def _read_parts(parts: Mapping[str, DTensor], source: WeightSource) -> None:
    for name, tensor in parts.items():
        local = tensor.to_local()
        if local.numel():
            local.copy_(_part(name, _box(name, tensor), source))


def _part(name: str, box: tuple[slice, ...], source: WeightSource) -> Tensor:
    if not box:
        return source.read([name])[name]
    rows, *columns = box
    return source.read_rows(name, rows.start, rows.stop)[(slice(None), *columns)]


def _box(name: str, tensor: DTensor) -> tuple[slice, ...]:
    """What of the whole tensor is this rank's."""
    odd = [p for p in tensor.placements if type(p) not in (Shard, Replicate)]
    if odd:
        raise WeightsError(
            f"{name} is placed as {', '.join(map(str, odd))}; a part is read as one box of the "
            "whole, which that is not. Shard it along one dimension"
        )
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
