"""Whether a run fits the number of its processes. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

from distill_protocols import Problem, RoleSpec
from distill_trainer.config import DistributedConfig, TrainingConfig

Strategy = Literal["none", "ddp", "fsdp2", "hsdp"]
PROCESSES_A_MACHINE = 8
"""Taken where nothing says it; a run knows it."""


def world_size_of(environment: Mapping[str, str]) -> int:
    """How many processes torchrun started; 1 without it."""
    return int(environment.get("WORLD_SIZE") or 1)


def strategy_of(config: DistributedConfig, world_size: int) -> Strategy:
    """The strategy as it is resolved where it is left out."""
    return config.strategy or ("ddp" if world_size > 1 else "none")


def group_size(config: DistributedConfig, world_size: int) -> int:
    """Processes that hold one copy of a sharded role between them."""
    if strategy_of(config, world_size) == "hsdp":
        return config.shard_size or math.gcd(PROCESSES_A_MACHINE, world_size)
    return world_size


def process_problems(training: TrainingConfig, world_size: int) -> Iterator[Problem]:
    """What does not go with ``world_size`` processes: pairs of a key of ``training`` and why."""
    try:
        training.accumulation(world_size)
    except ValueError as error:
        given = training.batch_size_per_device is not None
        yield Problem("batch_size_per_device" if given else "global_batch_size", str(error))
    distributed = training.distributed
    if distributed.strategy == "none" and world_size > 1:
        yield Problem(
            "distributed.strategy",
            f"none, but there are {world_size} processes; each would be a run of its own in the "
            "same folder. Use ddp, fsdp2 or hsdp, or start one process",
        )
    group = group_size(distributed, world_size)
    if world_size % group:
        yield Problem(
            "distributed.shard_size",
            f"{world_size} processes / {group} a group = {world_size / group:.3g} groups; it must "
            f"divide, because every group holds a whole copy. Use a divisor of {world_size}",
        )


def is_sharded(role: RoleSpec, config: DistributedConfig, world_size: int) -> bool:
    """Whether each process holds a part of the role: by strategy and policy."""
    strategy, policy = strategy_of(config, world_size), role.fsdp
    if strategy == "ddp":
        asked = world_size > 1 and not role.trainable and policy is not None
    else:
        asked = strategy in ("fsdp2", "hsdp")
    return asked and (policy is None or policy.shard)


def spread_problems(role: RoleSpec, training: TrainingConfig, world_size: int) -> Iterator[Problem]:
    """What of a role does not go with how it is spread: pairs of its key and why."""
    policy = role.fsdp
    if policy is not None and policy.shard:
        if policy.mixed_precision not in (None, role.precision):
            yield Problem(
                "fsdp.mixed_precision",
                f"{policy.mixed_precision} must be the role's precision ({role.precision}), as its "
                f"calls compute in that. Set models.{role.name}.precision: "
                f"{policy.mixed_precision}, or leave mixed_precision out",
            )
        if policy.cpu_offload and role.trainable and role.precision == "fp16":
            yield Problem(
                "fsdp.cpu_offload",
                "true with precision fp16; loss scaling looks for overflow on the device, and "
                "these gradients are elsewhere. Use precision: bf16",
            )
    if role.offload and is_sharded(role, training.distributed, world_size):
        yield Problem(
            "offload",
            f"true, but {role.name!r} is sharded, and parts are moved by their own policy. Use "
            "fsdp: {cpu_offload: true}, or fsdp: {shard: false} to keep it whole",
        )
    several = world_size > 1
    ddp = several and strategy_of(training.distributed, world_size) == "ddp"
    if ddp and role.trainable and role.fsdp is not None and role.fsdp.shard:
        yield Problem(
            "fsdp",
            f"{role.name!r} is trained under strategy ddp, which keeps all of it on every process. "
            "Use training.distributed: {strategy: fsdp2} to shard it, or leave the key out",
        )
