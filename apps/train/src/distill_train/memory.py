"""What each process of a run would hold: arithmetic over plans, no weights.

Letters: W processes that share one copy of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
from attrs import define, field, frozen
from distill_protocols import DTYPES, CallPlan, FsdpPolicy, RolePlan, RoleSpec, TensorPlan

from distill_train.process_rules import group_size, is_sharded
from distill_train.schema import Role, RunConfig

_MOMENTS = {"adamw": 2, "sgd": 0}
"""Tensors of a parameter's size that an optimizer keeps."""
_AT_ONCE = 2
"""Blocks that FSDP2 has gathered at once: the one that is called, and the next."""
_Block = tuple[str, str | None]
"""(module, block of it)."""


@frozen(kw_only=True)
class Held:
    """Bytes that lie in one place, from the first step on."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    ema: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema


@frozen(kw_only=True)
class Spread:
    """How one role lies over the processes.

    Attributes:
        ways: W.
        sharded: each process holds a part, and gathers a block to call it (FSDP2).
        buckets: whether buckets hold its gradients (DDP), in other roles' turns too.
    """

    ways: int = 1
    sharded: bool = False
    buckets: bool = False


@frozen(kw_only=True)
class RoleMemory:
    """One role on one process.

    Attributes:
        device, host: where what stays lies. ``device.gradients`` is there in this role's turn.
        buckets: part of ``device.gradients`` that stays in turns which are not its own.
        called: on the device only while the role is called: gathered blocks, their gradients, or
            weights that wait in host memory otherwise.
        call: what a call takes beside weights; None: the family cannot tell.
        judging: most at once in a call whose features a discriminator reads, differentiated by
            the clips; 0: nobody reads them.
    """

    device: Held
    host: Held
    buckets: int = 0
    called: int = 0
    call: CallPlan | None = None
    judging: int = 0

    @property
    def activations(self) -> int:
        """Most at once in a call."""
        return self.call.most if self.call else 0

    @property
    def in_a_call(self) -> int:
        """What comes and goes within one call."""
        return self.called + (self.call.most - self.call.held if self.call else 0)

    @property
    def total(self) -> int:
        """On the device, in its own turn."""
        return self.device.total + self.called + self.activations


@frozen(kw_only=True)
class Turn:
    """The fullest moment of the iterations in which ``roles`` learn.

    Attributes:
        staying: weights, optimizers, averages of all roles.
        gradients: of the roles that learn, and all buckets.
        held: activations that wait for the backward pass, of the roles that learn.
        calling: the largest that one call adds, whoever is called.
    """

    roles: tuple[str, ...]
    staying: int
    gradients: int
    held: int
    calling: int

    @property
    def total(self) -> int:
        return self.staying + self.gradients + self.held + self.calling


@frozen(kw_only=True)
class RunMemory:
    """All roles, and all turns, of the process that holds most."""

    roles: Mapping[str, RoleMemory]
    turns: tuple[Turn, ...]

    @property
    def peak(self) -> int:
        return max(turn.total for turn in self.turns)

    @property
    def host(self) -> int:
        return sum(role.host.total for role in self.roles.values())


@define(kw_only=True)
class Planner:
    """Memory of runs over ``world_size`` processes. Plans of models are made once each.

    Its methods take the run each time, as suggestions plan changed ones: in what changes a role,
    or its training, but never in family, clip or method.
    """

    world_size: int = 1
    _plans: dict[RoleSpec, RolePlan] = field(factory=dict)
    _calls: dict[Any, CallPlan | None] = field(factory=dict)
    _sums: dict[Any, Sums] = field(factory=dict)
    _sets: tuple[tuple[str, ...], ...] = ()

    def run(self, config: RunConfig) -> RunMemory:
        """Every role and every turn."""
        roles = {name: self.role(config, role) for name, role in config.roles.items()}
        sets = self._turns(config)
        heads = {name for name, role in config.roles.items() if role.spec.heads}
        beside = heads | read_by_heads(config)
        return RunMemory(
            roles=roles,
            turns=tuple(_turn(turn, sets, roles, judged=bool({*turn} - beside)) for turn in sets),
        )

    def role(self, config: RunConfig, role: Role, rank: int = 0) -> RoleMemory:
        """One role on process ``rank``; the first holds most."""
        spread = self.spread(config, role)
        sums = self._sum(config, role, spread.ways, rank % spread.ways)
        device, host = self._placed(config, role, spread, sums)
        return RoleMemory(
            device=device,
            host=host,
            buckets=sums.gradients if spread.buckets else 0,
            called=_called(role, spread, sums),
            call=self._call(config, role, spread),
            judging=self._judging(config, role, spread),
        )

    def spread(self, config: RunConfig, role: Role) -> Spread:
        """By strategy and policy."""
        distributed = config.training.distributed
        spec = role.spec
        if is_sharded(spec, distributed, self.world_size):
            return Spread(ways=group_size(distributed, self.world_size), sharded=True)
        alone = self.world_size == 1 or not spec.trainable
        return Spread(buckets=not alone and any(spec.name in t for t in self._turns(config)))

    def _turns(self, config: RunConfig) -> tuple[tuple[str, ...], ...]:
        """``turns``, counted once: no suggestion changes the method."""
        self._sets = self._sets or turns(config)
        return self._sets

    def plan(self, config: RunConfig, spec: RoleSpec) -> RolePlan:
        """From the family, made once for roles that are built alike."""
        blocks = spec.fsdp.blocks if spec.fsdp else ()
        key = RoleSpec(
            name="",
            path=spec.path,
            trainable=spec.trainable,
            precision=spec.precision,
            lora=spec.lora,
            fsdp=FsdpPolicy(blocks=blocks),
            heads=spec.heads,
        )
        if key not in self._plans:
            self._plans[key] = config.family_plugin.plan(key, config.pipeline)
        return attrs.evolve(self._plans[key], role=spec.name)

    def _placed(
        self, config: RunConfig, role: Role, spread: Spread, sums: Sums
    ) -> tuple[Held, Held]:
        """(on the device, in host memory)."""
        policy = role.spec.fsdp or FsdpPolicy()
        moments = 0 if role.optimizer is None else _MOMENTS[role.optimizer.name]
        parts = Held(
            weights=sums.weights,
            gradients=sums.gradients,
            optimizer=sums.moving * moments,
            ema=sums.moving if role.spec.name in averaged_roles(config) else 0,
        )
        # Buffers are never moved, and not sharded.
        weights = sums.buffers
        if spread.sharded and not policy.reshard_after_forward:
            weights += sums.gathered(policy)
        if spread.sharded and policy.cpu_offload:
            return Held(weights=weights, gradients=self._unsummed(config, policy, sums)), parts
        if role.spec.offload:
            return Held(weights=weights), Held(weights=parts.weights)
        gradients = parts.gradients
        if spread.sharded:
            gradients = max(gradients, self._unsummed(config, policy, sums))
        elif spread.buckets and config.training.accumulation(self.world_size) > 1:
            gradients *= 2  # those of earlier micro steps wait beside the buckets
        weights += parts.weights
        return attrs.evolve(parts, weights=weights, gradients=gradients), Held()

    def _unsummed(self, config: RunConfig, policy: FsdpPolicy, sums: Sums) -> int:
        """Whole gradients, which a sharded role holds until the last micro step sums them."""
        training = config.training
        if training.distributed.sync_every_micro_step:
            return 0
        several = training.accumulation(self.world_size) > 1
        return sums.whole_gradients(policy) if several else 0

    def _sum(self, config: RunConfig, role: Role, ways: int, rank: int) -> Sums:
        spec = role.spec
        blocks = spec.fsdp.blocks if spec.fsdp else ()
        key = (
            spec.path, spec.trainable, spec.precision, spec.lora, spec.base is None, blocks, ways,
            rank, spec.heads,
        )  # fmt: skip
        if key not in self._sums:
            plan = self.plan(config, spec)
            self._sums[key] = Sums.of(plan, ways=ways, rank=rank, own=spec.base is None)
        return self._sums[key]

    def _judging(self, config: RunConfig, role: Role, spread: Spread) -> int:
        if role.spec.name not in read_by_heads(config):
            return 0
        call = self._call(config, role, spread, judges=not role.spec.trainable)
        return call.most if call else 0

    def _call(
        self, config: RunConfig, role: Role, spread: Spread, *, judges: bool = False
    ) -> CallPlan | None:
        training, spec = config.training, role.spec
        rows = training.global_batch_size // (
            training.accumulation(self.world_size) * self.world_size
        )
        alone = spec.trainable or judges
        guided = not alone and config.method.needs_negative
        mixed = spec.fsdp.mixed_precision if spec.fsdp and spread.sharded else None
        seen = RoleSpec(
            name="",
            path=spec.path,
            trainable=spec.trainable,
            precision=spec.precision,
            lora=spec.lora,
            fsdp=FsdpPolicy(mixed_precision=mixed) if mixed else None,
            activation_checkpointing=alone and spec.activation_checkpointing,
            heads=spec.heads,
        )
        key = (seen, rows, guided, judges)
        if key not in self._calls:
            self._calls[key] = config.family_plugin.plan_call(
                seen,
                config.pipeline,
                source=config.source,
                batch=rows,
                guided=guided,
                input_gradient=judges,
            )
        return self._calls[key]


def share(tensor: TensorPlan, ways: int, rank: int = 0) -> int:
    """Elements of ``tensor`` on process ``rank`` of ``ways``.

    FSDP2 cuts dimension 0 into pieces of ceil(n / W) rows: the last ones may get fewer, or none.
    """
    rows = tensor.shape[0] if tensor.shape else 1
    piece = math.ceil(rows / ways)
    mine = max(0, min(piece, rows - rank * piece))
    return tensor.numel // rows * mine if rows else 0


@frozen(kw_only=True)
class Sums:
    """Bytes of one role's tensors, added up.

    Attributes:
        weights: stored on one process: of each tensor a full piece, as FSDP2 pads the last ones.
        called: of these, the largest module's: of two experts one is called at a time.
        gradients: likewise, of what trains, as wide as it.
        moving: of what trains, in fp32, without padding: what an optimizer moment has.
        whole: of each block of each module (None: of none), as stored: (bytes, elements).
        trained: likewise, of what trains.
        buffers: on each process.
    """

    weights: int
    called: int
    gradients: int
    moving: int
    whole: Mapping[_Block, tuple[int, int]]
    trained: Mapping[_Block, tuple[int, int]]
    buffers: int

    @classmethod
    def of(cls, plan: RolePlan, *, ways: int, rank: int, own: bool) -> Sums:
        """``own``: not of a role beside another's weights, which holds adapters alone."""
        trained = [t for m in plan.modules for t in m.tensors if t.trained]
        weights = [
            sum(share(t, ways) * t.dtype.itemsize for t in m.tensors if own or t.adapter)
            for m in plan.modules
        ]
        return cls(
            weights=sum(weights),
            called=max(weights, default=0),
            gradients=sum(share(t, ways) * t.dtype.itemsize for t in trained),
            moving=sum(share(t, ways, rank) * 4 for t in trained),
            whole=_by_block((m.name, t) for m in plan.modules for t in m.tensors),
            trained=_by_block((m.name, t) for m in plan.modules for t in m.tensors if t.trained),
            buffers=sum(m.buffer_bytes for m in plan.modules) if own else 0,
        )

    def gathered(self, policy: FsdpPolicy, *, at_once: int | None = None) -> int:
        """Bytes of gathered weights: of all modules, or of one what is outside of its blocks and
        the ``at_once`` largest."""
        sizes = _as_gathered(self.whole, policy)
        if at_once is None:
            return sum(sizes.values())
        outside = [nbytes for (_, block), nbytes in sizes.items() if block is None]
        blocks = [nbytes for (_, block), nbytes in sizes.items() if block is not None]
        return max(outside, default=0) + sum(sorted(blocks, reverse=True)[:at_once])

    def whole_gradients(self, policy: FsdpPolicy) -> int:
        """Unsharded, as they are between micro steps that do not sum them over processes."""
        return sum(n for _, n in self.trained.values()) * DTYPES[policy.reduce_precision].itemsize

    def gradients_of_a_block(self, policy: FsdpPolicy) -> int:
        """Of the largest, as it is differentiated, and as it is sent."""
        wide = _as_gathered(self.trained, policy)
        sent = DTYPES[policy.reduce_precision].itemsize
        return max((wide[b] + n * sent for b, (_, n) in self.trained.items()), default=0)


def _by_block(tensors: Iterable[tuple[str, TensorPlan]]) -> dict[_Block, tuple[int, int]]:
    found: dict[_Block, tuple[int, int]] = {}
    for module, tensor in tensors:
        nbytes, numel = found.get((module, tensor.block), (0, 0))
        found[module, tensor.block] = (nbytes + tensor.nbytes, numel + tensor.numel)
    return found


def _as_gathered(sizes: Mapping[_Block, tuple[int, int]], policy: FsdpPolicy) -> dict[_Block, int]:
    if policy.mixed_precision is None:
        return {block: nbytes for block, (nbytes, _) in sizes.items()}
    width = DTYPES[policy.mixed_precision].itemsize
    return {block: width * numel for block, (_, numel) in sizes.items()}


def _called(role: Role, spread: Spread, sums: Sums) -> int:
    policy = role.spec.fsdp or FsdpPolicy()
    waiting = sums.called if role.spec.offload else 0
    if not spread.sharded:
        return waiting
    blocks = sums.gathered(policy, at_once=_AT_ONCE) if policy.reshard_after_forward else 0
    return waiting + blocks + _AT_ONCE * sums.gradients_of_a_block(policy)


def read_by_heads(config: RunConfig) -> set[str]:
    """Roles whose features a discriminator reads."""
    return {role.spec.heads.on for role in config.roles.values() if role.spec.heads}


def averaged_roles(config: RunConfig) -> set[str]:
    """Roles of which a callback keeps an average."""
    return {
        role
        for name, callback in config.callbacks.items()
        for role in config.callback_plugins[name].averages(callback)
    }


def turns(config: RunConfig) -> tuple[tuple[str, ...], ...]:
    """Each set of roles that learn together in some iteration, in the order of the first."""
    steps = range(1, config.training.max_train_steps + 1)
    sets = dict.fromkeys(config.method.turns(step) for step in steps)
    return tuple(sets)


def _turn(
    learning: tuple[str, ...],
    sets: Sequence[tuple[str, ...]],
    roles: Mapping[str, RoleMemory],
    *,
    judged: bool,
) -> Turn:
    """``judged``: some role learns whose clips a discriminator judges, if there is one."""
    mine = [roles[name] for name in learning]
    # Of sets that have a role in common, the buckets of one are there.
    others = {name for other in sets if not {*other} & {*learning} for name in other}
    return Turn(
        roles=learning,
        staying=sum(r.device.total - r.device.gradients for r in roles.values()),
        gradients=sum(r.device.gradients for r in mine) + sum(roles[n].buckets for n in others),
        held=sum(r.call.held for r in mine if r.call),
        calling=max(
            max(r.in_a_call, r.called + r.judging if judged else 0) for r in roles.values()
        ),
    )
