"""How a run is distributed over processes: what is sharded, and when gradients are averaged."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

import torch
from attrs import field, frozen
from distill_protocols import (
    FsdpPolicy,
    RankError,
    RoleError,
    RoleHandle,
    TrainableMethod,
)
from distill_runtime import ALONE, Ranks, is_sharded
from torch import Tensor, distributed, nn

from distill_trainer.config import DistributedConfig
from distill_trainer.distribution.averaging import GradientAverager
from distill_trainer.distribution.launch import Launch, process_group
from distill_trainer.distribution.tensors import persistent_buffers, read_buffer, reshard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

Strategy = Literal["none", "ddp", "fsdp2", "hsdp"]

_SHARDING = ("fsdp2", "hsdp")


@frozen(eq=False, kw_only=True)
class Distribution:
    """The processes of a run and what each of them holds.

    A trained role is sharded (its parameters are DTensors), or every process has all of it. In
    both, the gradient of a loss is its mean over the processes:
    with losses that are means over equal batches, that of the global batch.

    Attributes:
        device: of this process.
        ranks: the processes, as one; ``ALONE`` for a single process.
        strategy: ``config.strategy``, or what its absence means here.
        mesh: over which roles are sharded; None: nothing is.
    """

    config: DistributedConfig
    device: torch.device
    ranks: Ranks = ALONE
    strategy: Strategy = "none"
    mesh: DeviceMesh | None = None
    _running: dict[TrainableMethod, _RunningMethod] = field(factory=dict, init=False)

    @classmethod
    @contextlib.contextmanager
    def start(cls, config: DistributedConfig, device_type: str) -> Iterator[Distribution]:
        """Connect the processes that torchrun started (RANK, WORLD_SIZE ... in the environment).

        A process group that exists already is used and left as it is; one that this makes is
        destroyed at the end of the block.

        Args:
            device_type: ``cuda`` (over nccl) or ``cpu`` (over gloo).

        Raises:
            RankError: strategy and number of processes do not fit, or one does not come.
        """
        launch = Launch.from_environment()
        device = launch.device(device_type)
        size = distributed.get_world_size() if distributed.is_initialized() else launch.size
        strategy = _resolve_strategy(config, size)
        with contextlib.ExitStack() as stack:
            # FSDP2 needs a process group even for one process.
            if size > 1 or strategy in _SHARDING:
                stack.enter_context(process_group(launch, device, config.timeout_seconds))
            ranks = stack.enter_context(Ranks.temporary(config.timeout_seconds))
            yield cls(
                config=config,
                device=device,
                ranks=ranks,
                strategy=strategy,
                mesh=_make_mesh(config, strategy, device.type, size),
            )

    @classmethod
    @contextlib.contextmanager
    def adopt(cls, config: DistributedConfig, weights: Sequence[Tensor]) -> Iterator[Distribution]:
        """Take the processes that other code has brought together, if any.

        What that code sharded is trained as such; of everything else each process has all.

        Args:
            weights: of all roles; the first one's device is that of this process.

        Raises:
            RankError: strategy and number of processes do not fit.
            RoleError: the strategy shards, but no weight is sharded.
        """
        with Ranks.temporary(config.timeout_seconds) as ranks:
            strategy = _resolve_strategy(config, ranks.size)
            if strategy in _SHARDING and not any(map(is_sharded, weights)):
                raise RoleError(
                    f"the strategy is {strategy}, but no weights are sharded, and once roles have "
                    "optimizers it is too late for that. Within Distribution.start(...) call its "
                    "shard(role) for each role, then build_optimizers, and give it to "
                    "DistillTrainer(distribution=); or leave the strategy out."
                )
            yield cls(
                config=config,
                device=weights[0].device if weights else torch.device("cpu"),
                ranks=ranks,
                strategy=strategy,
            )

    def shard(self, role: RoleHandle) -> None:
        """Replace the parameters of ``role`` (on meta or not) by DTensors, where the strategy and
        ``role.fsdp_policy`` ask for it. It comes before the role's optimizers are made.

        ===========  ========================  =============================
        strategy     trained role              frozen role
        ===========  ========================  =============================
        none         full                      full
        ddp          full                      full, sharded with a policy
        fsdp2, hsdp  sharded                   sharded
        ===========  ========================  =============================

        ``FsdpPolicy(shard=False)`` keeps any role in full on each process.

        Raises:
            RoleError: strategy and policy do not fit, or the policy does not fit the role.
            ContractError: the role has optimizers already.
        """
        policy = role.fsdp_policy
        if self.mesh is None or (policy is not None and not policy.shard):
            return
        if self.strategy not in _SHARDING:
            if policy is None or self.strategy == "none":
                return
            if role.trainable:
                raise RoleError(
                    f"role {role.name!r} is trained and has an FsdpPolicy under the strategy "
                    f"{self.strategy}, which keeps all of a trained role on every process. Use the "
                    "strategy fsdp2 to shard it, or leave the policy out."
                )
        from distill_trainer.distribution.fsdp import shard_role

        shard_role(role, policy or FsdpPolicy(), self.mesh)

    def prepare(self, method: TrainableMethod) -> None:
        """Make weights that each process holds in full those of the first one.

        All processes call it alike, once before the first ``micro_step`` of a run.
        """
        self._running[method] = _RunningMethod.prepare(method, self.ranks)

    def micro_step(
        self, method: TrainableMethod, iteration: int, *, last: bool
    ) -> AbstractContextManager[None]:
        """Surround forward and backward of one micro step: gradients are averaged over processes in
        the last one only, and for all micro steps of the iteration."""
        running = self._running[method]
        if not running.distributed:
            return _DO_NOTHING
        return running.micro_step(self.config, iteration, last=last)

    def drop_gradients(self, method: TrainableMethod) -> None:
        """Forget an iteration that was left before its last micro step was done."""
        running = self._running[method]
        if running.sharded:
            from distill_trainer.distribution.fsdp import drop_gradients

            drop_gradients(running.sharded)


_DO_NOTHING = contextlib.nullcontext()


@frozen(eq=False, kw_only=True)
class _RunningMethod:
    """A method under training.

    Attributes:
        averager: of gradients, where each of several processes has all of a trained role.
        sharded: the outermost sharded modules of all roles.
        buffers: the persistent buffers of trained roles (batch norm and the like).
    """

    averager: GradientAverager | None
    sharded: list[FSDPModule]
    buffers: list[tuple[nn.Module, str]]

    @classmethod
    def prepare(cls, method: TrainableMethod, ranks: Ranks) -> _RunningMethod:
        several = ranks.size > 1
        roles = method.bundle.roles.values()
        modules = list(method.model_dict.values())
        sharded: list[FSDPModule] = []
        if several or any(is_sharded(p) for module in modules for p in module.parameters()):
            from distill_trainer.distribution.fsdp import outermost_sharded

            sharded = outermost_sharded(modules)
            for module in modules:
                reshard(module)  # or gathered copies would be taken for weights
        trained = [p for role in roles for key in role.modules
                   for p in role.trained_parameters(key).values()]  # fmt: skip
        has_full = several and not all(map(is_sharded, trained))
        return cls(
            averager=GradientAverager(method, ranks) if has_full else None,
            sharded=sharded,
            buffers=persistent_buffers(method.bundle) if several else [],
        )

    @property
    def distributed(self) -> bool:
        """Whether a micro step has anything to do with other processes or with FSDP."""
        return bool(self.averager is not None or self.sharded or self.buffers)

    @contextlib.contextmanager
    def micro_step(
        self, config: DistributedConfig, iteration: int, *, last: bool
    ) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self.sharded:
                from distill_trainer.distribution.fsdp import sync_gradients

                # Reducing in each micro step sends more, but no unsharded gradient waits between.
                now = last or config.sync_every_micro_step
                stack.enter_context(sync_gradients(self.sharded, now=now))
            yield
        if last and self.averager is not None:
            self.averager.average(iteration)
        if last:
            # Each process moves the buffers by its own batches. Without this they would drift
            # apart, and the checkpoint would hold those of rank 0 alone.
            for module, name in self.buffers:
                distributed.broadcast(read_buffer(module, name), 0)


def _resolve_strategy(config: DistributedConfig, size: int) -> Strategy:
    """Return ``config.strategy``, or what its absence means for ``size`` processes."""
    if config.strategy is None:
        return "ddp" if size > 1 else "none"
    if config.strategy == "none" and size > 1:
        raise RankError(
            f"the strategy is none with {size} processes; each would train by itself and write "
            "the same files. Start one process, or use ddp, fsdp2 or hsdp."
        )
    return config.strategy


def _make_mesh(
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
            f"hsdp: {size} processes / {shard_size} a group (shard_size) = "
            f"{size / shard_size:.3g} groups; it must divide, because every group holds one full "
            f"copy. Use a shard_size of {' or '.join(divisors)}, or another number of processes."
        )
    shape = (size // shard_size, shard_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
