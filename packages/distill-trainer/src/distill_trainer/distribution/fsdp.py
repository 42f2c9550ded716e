"""Roles of which each process holds a shard (FSDP2, ``torch.distributed.fsdp.fully_shard``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from distill_protocols import DTYPES, ContractError, FsdpPolicy, RoleError, RoleHandle
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.utils._pytree import tree_map_only

from distill_trainer.distribution.tensors import reshard


def shard_role(role: RoleHandle, policy: FsdpPolicy, mesh: DeviceMesh) -> None:
    """Replace the parameters of ``role`` by DTensors; its repeated blocks are gathered one by one.

    Args:
        mesh: 1-d: shards over all of it; 2-d: copies over the first dimension, shards over the
            second.

    Raises:
        RoleError: the policy does not fit the role.
        ContractError: the role has optimizers already.
    """
    _check_policy(role, policy)
    device = torch.device("cpu")
    if mesh.device_type != "cpu":
        device = torch.device(mesh.device_type, torch.accelerator.current_device_index())
    offload = OffloadPolicy()
    if policy.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    compute_dtype = policy.mixed_precision
    shard = partial(
        fully_shard,
        mesh=mesh,
        # For the root too: left to itself FSDP keeps it gathered after a call, and whoever writes
        # weights or requires_grad from outside would write into that copy, which is then dropped.
        reshard_after_forward=policy.reshard_after_forward,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=None if compute_dtype is None else DTYPES[compute_dtype],
            reduce_dtype=DTYPES[policy.reduce_precision],
            # The adapter casts what may be cast: t must never have 16 bits.
            cast_forward_inputs=False,
        ),
        offload_policy=offload,
    )
    for key, module in role.modules.items():
        if not isinstance(module, FSDPModule):
            module.register_forward_hook(_copy_views)  # before FSDP's own
        for block in _blocks_to_gather(role, key, policy):
            # A block may be another role's too, whose weights stand beside this one's adapters.
            if not isinstance(block, FSDPModule):
                shard(block)
        if not isinstance(module, FSDPModule):
            shard(module)
    modules = tuple(role.modules.values())

    def release_gathered() -> None:
        for module in modules:
            reshard(module)

    role.device = device
    role.release_gathered = release_gathered


def outermost_sharded(modules: list[nn.Module]) -> list[FSDPModule]:
    """List the outermost sharded modules, each once."""
    outermost: dict[FSDPModule, None] = {}
    for module in modules:
        if isinstance(module, FSDPModule):
            outermost[module] = None
        else:
            outermost |= dict.fromkeys(outermost_sharded(list(module.children())))
    return list(outermost)


@contextlib.contextmanager
def sync_gradients(modules: list[FSDPModule], *, now: bool) -> Iterator[None]:
    """Surround forward and backward of one micro step.

    Args:
        now: average its gradients over processes, and all that wait, in modules too that this
            micro step does not reach; else they wait, unsharded, on this process.
    """
    for module in modules:
        # By hand: left to itself FSDP finalizes at the end of each backward pass that reaches a
        # module. Gradients that wait in a model which the last micro step left out (another
        # expert's turn) would never be reduced, and a model that is never trained would keep a
        # record of each of its calls.
        module.set_manual_backward_finalization(True)
        module.set_requires_gradient_sync(now)
    yield
    if now:
        for module in modules:
            module.finalize_backward()
            module.set_manual_backward_finalization(False)


def drop_gradients(modules: list[FSDPModule]) -> None:
    """Forget an unfinished iteration: a call that was interrupted, gradients that wait."""
    for module in modules:
        module.reset_iter_state()
        module.set_manual_backward_finalization(False)


def _copy_views(_module: nn.Module, _inputs: object, output: Any) -> Any:
    """Replace views in ``output`` (a model's last reshape) by copies.

    FSDP's backward hook hangs on the tensor itself: an in-place operation on a view would drop it,
    and the gradients would never be reduced. Each process would only warn of that.
    """
    return tree_map_only(torch.Tensor, lambda x: x.clone() if x._is_view() else x, output)


def _blocks_to_gather(role: RoleHandle, key: str, policy: FsdpPolicy) -> list[nn.Module]:
    """List the submodules that are gathered one at a time."""
    module = role.modules[key]
    if not policy.blocks:
        return [module.get_submodule(name) for name in role.blocks.get(key, ())]
    lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
    blocks: list[nn.Module] = []
    for name in policy.blocks:
        if name not in lists:
            raise RoleError(
                f"role {role.name!r}: FsdpPolicy.blocks names {name!r}, which must be a module "
                f"list of {key} ({type(module).__name__}), as its entries are gathered one at a "
                f"time; it has: {', '.join(lists) or 'none'}. Name one of them, or leave blocks "
                "empty for the family's choice."
            )
        blocks += lists[name]
    return blocks


def _check_policy(role: RoleHandle, policy: FsdpPolicy) -> None:
    if role.optimizers:
        raise ContractError(
            f"role {role.name!r} has optimizers ({', '.join(role.optimizers)}) and must have none "
            "before it is sharded: they would hold on to the parameters that the shards replace. "
            "Call Distribution.shard first, then build_optimizers."
        )
    if role.offload:
        raise RoleError(
            f"role {role.name!r} has offload=True and is sharded; shards are moved by the role's "
            "FsdpPolicy alone. Use FsdpPolicy(cpu_offload=True) instead of offload, or "
            "FsdpPolicy(shard=False)."
        )
    if policy.mixed_precision not in (None, role.precision):
        raise RoleError(
            f"role {role.name!r}: FsdpPolicy.mixed_precision {policy.mixed_precision} must be the "
            f"role's precision ({role.precision}), as its calls compute in that. Make them equal, "
            "or leave mixed_precision out."
        )
    if policy.cpu_offload and role.trainable and role.precision == "fp16":
        raise RoleError(
            f"role {role.name!r}: FsdpPolicy.cpu_offload with precision fp16; loss scaling looks "
            "for overflow on the device, and these gradients are elsewhere. Use precision bf16."
        )
    for key, module in role.modules.items():
        scalars = [name for name, p in module.named_parameters() if p.ndim == 0]
        if scalars:
            raise RoleError(
                f"role {role.name!r}, {key}: {', '.join(scalars[:4])} has no dimension to shard. "
                "Give it the shape [1], or keep the role unsharded with FsdpPolicy(shard=False)."
            )
