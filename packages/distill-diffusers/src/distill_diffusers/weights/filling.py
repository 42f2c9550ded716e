"""Put weights into modules on the meta device: on each process what it holds, and no more.

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


def fill(
    targets: Mapping[str, Tensor],
    open_source: Callable[[], WeightSource],
    *,
    ranks: Ranks,
    device_of: Callable[[Tensor], torch.device],
) -> dict[str, Tensor]:
    """Make tensors like ``targets``, which may be on meta, with the numbers of a source.

    Args:
        targets: names, shapes, types and placements; alike on all ranks.
        open_source: gives what has just those names and shapes. It is asked for on the first rank,
            and on another only if that holds parts.
        ranks: all of them call this together.
        device_of: gives the device that each is kept on.

    Raises:
        WeightsError: it cannot be read, by any of the ranks; the same error on all.
    """
    state = {name: torch.empty_like(t, device=device_of(t)) for name, t in targets.items()}
    shards = {name: t for name, t in state.items() if isinstance(t, DTensor)}
    full = {name: t for name, t in state.items() if name not in shards}
    opened: list[WeightSource] = []
    if targets:
        ranks.run_each(lambda: opened.append(open_source()) if ranks.is_first or shards else None)
    for group in in_groups(full, lambda name: full[name].nbytes, GROUP_BYTES):
        tensors = {name: full[name] for name in group}
        ranks.run_each(
            lambda tensors=tensors: _read(tensors, opened[0]) if ranks.is_first else None
        )
        # All ranks broadcast the same tensors in the same order, or the group hangs.
        with ranks.within_timeout():
            for tensor in tensors.values():
                _broadcast(tensor, ranks)
    if shards:
        ranks.run_each(lambda: _read_shards(shards, opened[0]))
    return state


def move_buffers(module: nn.Module, device: torch.device | str) -> None:
    """Move buffers alone: ``module.to`` would move parameters that wait on the CPU, too."""
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, buffer.to(device))


def _read(tensors: Mapping[str, Tensor], source: WeightSource) -> None:
    weights = source.read(tensors)
    for name, tensor in tensors.items():
        tensor.copy_(weights.pop(name))  # a copy: what is read may still be the mapped file


def _broadcast(tensor: Tensor, ranks: Ranks) -> None:
    if ranks.group is None:
        return
    sent = tensor.cpu()  # gloo sends host memory; of a CPU tensor it is the tensor itself
    distributed.broadcast(sent, 0, group=ranks.group)
    if sent is not tensor:
        tensor.copy_(sent)


def _read_shards(shards: Mapping[str, DTensor], source: WeightSource) -> None:
    """Read this rank's own part of each tensor, and of the file no other rows than those."""
    for name, tensor in shards.items():
        local = tensor.to_local()
        if not local.numel():
            continue
        box = _local_box(name, tensor)
        if not box:
            local.copy_(source.read([name])[name])
            continue
        rows, *columns = box
        local.copy_(source.read_rows(name, rows.start, rows.stop)[(slice(None), *columns)])


def _local_box(name: str, tensor: DTensor) -> tuple[slice, ...]:
    """Return the part of the full tensor that is this rank's, one slice a dimension."""
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
