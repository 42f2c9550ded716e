"""Whether a run fits the number of its processes."""

from __future__ import annotations

from collections.abc import Iterator

from distill_protocols import Problem, RoleSpec, below
from distill_trainer.config import TrainingConfig

from distill_runfile.draft import Draft
from distill_runfile.planning.placement import group_size, is_sharded, strategy_of


def check_processes(draft: Draft) -> Iterator[Problem]:
    """Batch arithmetic and strategy, then each role's policy."""
    if draft.readable_training is not None:
        problems = _training_problems(draft.readable_training, draft.world_size)
        yield from below(problems, "training")
    if draft.training is None:
        return
    for name, role in draft.roles.items():
        # What a role beside another's weights does not say is written under that one.
        owner = role.spec.base or name
        yield from below(
            _role_problems(role.spec, draft.training, draft.world_size), "models", owner
        )


def _training_problems(training: TrainingConfig, world_size: int) -> Iterator[Problem]:
    try:
        training.accumulation(world_size)
    except ValueError as error:
        per_device = training.batch_size_per_device is not None
        yield Problem("batch_size_per_device" if per_device else "global_batch_size", str(error))
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


def _role_problems(role: RoleSpec, training: TrainingConfig, world_size: int) -> Iterator[Problem]:
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
            f"true, but {role.name!r} is sharded, and shards are moved by their own policy. Use "
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
