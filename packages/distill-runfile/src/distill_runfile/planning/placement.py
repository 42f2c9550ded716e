"""How roles lie over the processes of a run. No torch."""

from __future__ import annotations

import math
from typing import Literal

from attrs import frozen
from distill_protocols import RoleSpec
from distill_trainer.config import DistributedConfig

Strategy = Literal["none", "ddp", "fsdp2", "hsdp"]
PROCESSES_PER_MACHINE = 8
"""Assumed where it is not stated; a run knows it."""


@frozen(kw_only=True)
class RolePlacement:
    """How one role lies over the processes.

    Attributes:
        shards: number of processes that share one copy of its weights.
        sharded: each of them holds a shard, and gathers a block to call it (FSDP2).
    """

    shards: int = 1
    sharded: bool = False


def strategy_of(config: DistributedConfig, world_size: int) -> Strategy:
    """Return the strategy as it is resolved where it is left out."""
    return config.strategy or ("ddp" if world_size > 1 else "none")


def group_size(config: DistributedConfig, world_size: int) -> int:
    """Number of processes that hold one copy of a sharded role between them."""
    if strategy_of(config, world_size) == "hsdp":
        return config.shard_size or math.gcd(PROCESSES_PER_MACHINE, world_size)
    return world_size


def is_sharded(role: RoleSpec, config: DistributedConfig, world_size: int) -> bool:
    """Return whether each process holds a shard of the role, by strategy and policy."""
    strategy, policy = strategy_of(config, world_size), role.fsdp
    if strategy == "ddp":
        # DDP keeps trained roles complete; frozen ones are sharded where their policy asks for it.
        may_shard = world_size > 1 and not role.trainable and policy is not None
    else:
        may_shard = strategy in ("fsdp2", "hsdp")
    return may_shard and (policy is None or policy.shard)
