"""How a run is spread over processes: what is sharded, and when gradients are averaged."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import field, frozen
from distill_protocols import (
    FsdpPolicy,
    RankError,
    RoleError,
    RoleHandle,
    StepResult,
    TrainableMethod,
)
from distill_runtime import ALONE, Ranks
from torch import Tensor, distributed, nn

from distill_trainer.config import DistributedConfig
from distill_trainer.ddp import DDPTrainStepWrapper
from distill_trainer.processes import Launch, process_group
from distill_trainer.rewind import buffer_of, persistent_buffers
from distill_trainer.shards import is_shard, reshard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

Strategy = Literal["none", "ddp", "fsdp2", "hsdp"]

TrainStep = Callable[[Any, int], StepResult]
"""(batch, iteration) -> what ``DistillMethod.single_train_step`` returns."""

_SHARDS = ("fsdp2", "hsdp")


@frozen(eq=False, kw_only=True)
class Distribution:
    """The processes of a run and what each of them holds.

    A trained role is sharded (its parameters are DTensors), or whole on every process: then
    ``train_step`` goes through DDP. In both, the gradient of a loss is its mean over the processes:
    with losses that are means over equal batches, that of the global batch.

    Attributes:
        device: this process's own.
        ranks: the processes, as one; ``ALONE`` for a single process.
        strategy: ``config.strategy``, or what its absence means here.
        mesh: over which roles are sharded; None: nothing is.
    """

    config: DistributedConfig
    device: torch.device
    ranks: Ranks = ALONE
    strategy: Strategy = "none"
    mesh: DeviceMesh | None = None
    _running: dict[TrainableMethod, _Running] = field(factory=dict, init=False)

    @classmethod
    @contextlib.contextmanager
    def started(cls, config: DistributedConfig, device_type: str) -> Iterator[Distribution]:
        """Within: the processes that torchrun started (RANK, WORLD_SIZE ... in the environment)
        know each other; a process group that exists already is used and left as it is.

        Args:
            device_type: ``cuda`` (over nccl) or ``cpu`` (over gloo).

        Raises:
            RankError: strategy and number of processes do not fit, or one does not come.
        """
        launch = Launch.of_this_process()
        device = launch.device(device_type)
        there = distributed.is_initialized()
        size = distributed.get_world_size() if there else launch.size
        strategy = _strategy(config, size)
        with contextlib.ExitStack() as stack:
            if size > 1 or strategy in _SHARDS:
                stack.enter_context(process_group(launch, device, config.timeout_seconds))
            ranks = stack.enter_context(Ranks.temporary(config.timeout_seconds))
            yield cls(
                config=config,
                device=device,
                ranks=ranks,
                strategy=strategy,
                mesh=_mesh(config, strategy, device.type, size),
            )

    @classmethod
    @contextlib.contextmanager
    def found(cls, config: DistributedConfig, weights: Sequence[Tensor]) -> Iterator[Distribution]:
        """Within: the processes that somebody else's code has brought together, if any.

        What it sharded is trained as such; everything else is whole on each of them.

        Args:
            weights: of all roles; the first one's device is this process's own.

        Raises:
            RankError: strategy and number of processes do not fit.
            RoleError: a strategy that shards, and nobody has sharded any weight.
        """
        with Ranks.temporary(config.timeout_seconds) as ranks:
            strategy = _strategy(config, ranks.size)
            if strategy in _SHARDS and not any(map(is_shard, weights)):
                raise RoleError(
                    f"training.distributed.strategy: {strategy}, but no weights are sharded, and "
                    "once roles have optimizers it is too late for that. Within "
                    "Distribution.started(...) call its shard(role) for each role, then "
                    "build_optimizers, and give it to DistillTrainer(distribution=); or leave the "
                    "strategy out."
                )
            yield cls(
                config=config,
                device=weights[0].device if weights else torch.device("cpu"),
                ranks=ranks,
                strategy=strategy,
            )

    def shard(self, role: RoleHandle) -> None:
        """Put DTensors in the place of the parameters of ``role`` (on meta or not), by strategy
        and ``role.fsdp_policy``. Before its optimizers are made.

        ===========  ========================  =============================
        strategy     trained role              frozen role
        ===========  ========================  =============================
        none         whole                     whole
        ddp          whole                     whole, sharded with a policy
        fsdp2, hsdp  sharded                   sharded
        ===========  ========================  =============================

        A policy with ``shard: false`` keeps any role whole.

        Raises:
            RoleError: strategy and policy do not fit, or the policy does not fit the role.
            ContractError: the role has optimizers already.
        """
        policy = role.fsdp_policy
        if self.mesh is None or (policy is not None and not policy.shard):
            return
        if self.strategy not in _SHARDS:
            if policy is None or self.strategy == "none":
                return
            if role.trainable:
                raise RoleError(
                    f"models.{role.name}.fsdp under strategy: {self.strategy}, which keeps all of "
                    "a trained role on every process. Set training.distributed.strategy: fsdp2 to "
                    "shard it, or leave the key out."
                )
        from distill_trainer.sharding import shard_role

        shard_role(role, policy or FsdpPolicy(), self.mesh)

    def train_step(self, method: TrainableMethod) -> TrainStep:
        """``method.single_train_step`` such that what averages gradients sees it (DDP's hooks).

        All processes call it alike, once before the first ``micro_step`` of a run.
        """
        self._running.pop(method, None)  # its hooks, before others are hung on the same weights
        running = _Running.of(method, self.ranks)
        self._running[method] = running
        return method.single_train_step if running.ddp is None else running.ddp.single_train_step

    @contextlib.contextmanager
    def micro_step(self, method: TrainableMethod, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro step: gradients are averaged over processes in
        the last one only, and for all micro steps of the iteration."""
        running = self._running[method]
        with contextlib.ExitStack() as stack:
            if running.sharded:
                from distill_trainer.sharding import synchronised

                now = last or self.config.sync_every_micro_step
                stack.enter_context(synchronised(running.sharded, now))
            if running.ddp is not None:
                stack.enter_context(running.ddp.micro_step(last=last))
            yield
        if last:
            for part, name in running.buffers:
                distributed.broadcast(buffer_of(part, name), 0)

    def drop_gradients(self, method: TrainableMethod) -> None:
        """Forget an iteration that was left before its last micro step was done."""
        running = self._running[method]
        if running.sharded:
            from distill_trainer.sharding import drop_gradients

            drop_gradients(running.sharded)


@frozen(eq=False, kw_only=True)
class _Running:
    """A method under training.

    Attributes:
        ddp: around its step, where trained roles are whole on several processes.
        sharded: the outermost sharded modules of all roles.
        buffers: what a checkpoint holds of trained roles beside parameters (batch norm): each
            process would move its own, so rank 0's become everybody's.
    """

    ddp: DDPTrainStepWrapper | None
    sharded: list[FSDPModule]
    buffers: list[tuple[nn.Module, str]]

    @classmethod
    def of(cls, method: TrainableMethod, ranks: Ranks) -> _Running:
        several = ranks.size > 1
        roles = method.bundle.roles.values()
        modules = list(method.model_dict.values())
        sharded: list[FSDPModule] = []
        if several or any(is_shard(p) for module in modules for p in module.parameters()):
            from distill_trainer.sharding import roots

            sharded = roots(modules)
            for module in modules:
                reshard(module)  # or DDP would take gathered copies for weights
        trained = [p for role in roles for key in role.modules
                   for p in role.trained_parameters(key).values()]  # fmt: skip
        return cls(
            ddp=DDPTrainStepWrapper(method)
            if several and not all(map(is_shard, trained))
            else None,
            sharded=sharded,
            buffers=persistent_buffers(method.bundle) if several else [],
        )


def _strategy(config: DistributedConfig, size: int) -> Strategy:
    """What ``config.strategy``, or its absence, means for ``size`` processes."""
    if config.strategy is None:
        return "ddp" if size > 1 else "none"
    if config.strategy == "none" and size > 1:
        raise RankError(
            f"training.distributed.strategy: none with {size} processes; each would train by "
            "itself and write the same files. Start one process, or use ddp, fsdp2 or hsdp."
        )
    return config.strategy


def _mesh(
    config: DistributedConfig, strategy: Strategy, device_type: str, size: int
) -> DeviceMesh | None:
    if not distributed.is_initialized():
        return None
    from torch.distributed.device_mesh import init_device_mesh

    if strategy != "hsdp":
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    machine = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    shard_size = machine if config.shard_size is None else config.shard_size
    if size % shard_size:
        divisors = [str(n) for n in range(1, size + 1) if size % n == 0]
        raise RankError(
            f"hsdp: {size} processes / {shard_size} a group (training.distributed.shard_size) = "
            f"{size / shard_size:.3g} groups; it must divide, because every group holds one whole "
            f"copy. Use a shard_size of {' or '.join(divisors)}, or another number of processes."
        )
    shape = (size // shard_size, shard_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
