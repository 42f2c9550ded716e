"""Roles of which each process holds a part (FSDP2, ``torch.distributed.fsdp.fully_shard``)."""

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

from distill_trainer.shards import reshard


def shard_role(role: RoleHandle, policy: FsdpPolicy, mesh: DeviceMesh) -> None:
    """Put DTensors in the place of the parameters of ``role``, its repeated blocks one by one.

    Args:
        mesh: 1-d: over all of it; 2-d: copies over the first dimension, parts over the second.

    Raises:
        RoleError: the policy does not fit the role.
        ContractError: the role has optimizers already.
    """
    _check(role, policy)
    device = _device_of(mesh)
    offload = OffloadPolicy()
    if policy.cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    narrow = policy.mixed_precision
    spread = partial(
        fully_shard,
        mesh=mesh,
        # Given for the root too: left to itself it stays gathered after a call, and what writes
        # weights or requires_grad from outside would write into, or past, that copy.
        reshard_after_forward=policy.reshard_after_forward,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=None if narrow is None else DTYPES[narrow],
            reduce_dtype=DTYPES[policy.reduce_precision],
            # Inputs are the adapter's business: t must never be 16 bits.
            cast_forward_inputs=False,
        ),
        offload_policy=offload,
    )
    for key, module in role.modules.items():
        if not isinstance(module, FSDPModule):
            module.register_forward_hook(_owned)  # before FSDP's own
        blocks = _blocks(role, key, policy)
        for block in blocks:
            # A block may be another role's too, whose weights stand beside this one's adapters.
            if not isinstance(block, FSDPModule):
                spread(block)
        if not isinstance(module, FSDPModule):
            spread(module)
    role.device = device
    role.release_gathered = partial(_put_away, tuple(role.modules.values()))


def roots(modules: list[nn.Module]) -> list[FSDPModule]:
    """The outermost sharded modules, each once."""
    found: dict[FSDPModule, None] = {}
    for module in modules:
        if isinstance(module, FSDPModule):
            found[module] = None
        else:
            found |= dict.fromkeys(roots(list(module.children())))
    return list(found)


@contextlib.contextmanager
def synchronised(modules: list[FSDPModule], now: bool) -> Iterator[None]:
    """Around forward and backward of one micro step.

    Args:
        now: average its gradients over processes, and all that wait, in modules too that this
            micro step does not reach; else they wait, whole, on this process.
    """
    for module in modules:
        # By hand: left to itself FSDP forgets what waits in a model that the last micro step left
        # out (another expert's turn), and keeps a note of each call of one that is never trained.
        module.set_manual_backward_finalization(True)
        module.set_requires_gradient_sync(now)
    yield
    if now:
        for module in modules:
            module.finalize_backward()
            module.set_manual_backward_finalization(False)


def drop_gradients(modules: list[FSDPModule]) -> None:
    """Forget an unfinished iteration: a call that was left, gradients that wait."""
    for module in modules:
        module.reset_iter_state()
        module.set_manual_backward_finalization(False)


def _owned(_module: nn.Module, _inputs: object, output: Any) -> Any:
    """``output`` with copies in place of views (a model's last reshape).

    FSDP's hook hangs on the tensor itself: an in-place operation on a view would drop it, silently,
    and each process would warn of that.
    """
    return tree_map_only(torch.Tensor, lambda x: x.clone() if x._is_view() else x, output)


def _put_away(modules: tuple[nn.Module, ...]) -> None:
    for module in modules:
        reshard(module)


def _device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def _blocks(role: RoleHandle, key: str, policy: FsdpPolicy) -> list[nn.Module]:
    """What is gathered one at a time."""
    module = role.modules[key]
    if not policy.blocks:
        return [module.get_submodule(name) for name in role.blocks.get(key, ())]
    lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
    blocks: list[nn.Module] = []
    for name in policy.blocks:
        if name not in lists:
            raise RoleError(
                f"models.{role.name}.fsdp.blocks: {name!r} must be a module list of {key} "
                f"({type(module).__name__}), as its entries are what is gathered one at a time; it "
                f"has: {', '.join(lists) or 'none'}. Name one of them, or leave `blocks` out for "
                "the family's choice."
            )
        blocks += lists[name]
    return blocks


def _check(role: RoleHandle, policy: FsdpPolicy) -> None:
    if role.optimizers:
        raise ContractError(
            f"role {role.name!r} has optimizers ({', '.join(role.optimizers)}) and must have none "
            "before it is sharded: they would hold on to the parameters that the parts replace. "
            "Call Distribution.shard first, then build_optimizers."
        )
    if role.offload:
        raise RoleError(
            f"models.{role.name}.offload: true of a role that is sharded, whose parts are moved by "
            f"its own policy. Use models.{role.name}.fsdp: {{cpu_offload: true}}, or keep the role "
            "whole with fsdp: {shard: false}."
        )
    if policy.mixed_precision not in (None, role.precision):
        raise RoleError(
            f"models.{role.name}.fsdp.mixed_precision: {policy.mixed_precision} must be the role's "
            f"precision ({role.precision}), as its calls compute in that. Set "
            f"models.{role.name}.precision: {policy.mixed_precision}, or leave mixed_precision out."
        )
    if policy.cpu_offload and role.trainable and role.precision == "fp16":
        raise RoleError(
            f"models.{role.name}.fsdp.cpu_offload: true with precision fp16; loss scaling looks "
            "for overflow on the device, and these gradients are elsewhere. Use precision bf16."
        )
    for key, module in role.modules.items():
        numbers = [name for name, p in module.named_parameters() if p.ndim == 0]
        if numbers:
            raise RoleError(
                f"role {role.name!r}, {key}: {', '.join(numbers[:4])} is a single number, which "
                "has no rows to share out. Give it the shape [1], or keep the role whole with "
                f"models.{role.name}.fsdp: {{shard: false}}."
            )
