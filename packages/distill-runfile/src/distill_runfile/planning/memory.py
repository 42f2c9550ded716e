"""What each process of a run would hold: arithmetic over plans, no weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import attrs
from attrs import define, field, frozen
from distill_protocols import DTYPES, CallPlan, FsdpPolicy, RolePlan, RoleSpec, TensorPlan

from distill_runfile.planning.placement import RolePlacement, group_size, is_sharded
from distill_runfile.schema import Role, RunConfig

_MOMENTS = {"adamw": 2, "sgd": 0}
"""Tensors of a parameter's size that an optimizer keeps."""
_GATHERED_BLOCKS = 2
"""How many blocks FSDP2 has gathered at once: the one that is called, and the next."""
_Block = tuple[str, str | None]
"""(module, block of it)."""


@frozen(kw_only=True)
class ResidentBytes:
    """Bytes that one role keeps in one place, from the first step on."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    ema: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema


@frozen(kw_only=True)
class RoleMemory:
    """One role on one process.

    Attributes:
        device, host: where what stays lies. ``device.gradients`` is there in this role's turn.
        called: on the device only while the role is called: gathered blocks, their gradients, or
            weights that wait in host memory otherwise.
        call: what a call takes beside weights; None: the family cannot estimate it.
        judged_call: most at once in a call whose features a discriminator reads, differentiated by
            the clips; 0: nobody reads them.
    """

    device: ResidentBytes
    host: ResidentBytes
    called: int = 0
    call: CallPlan | None = None
    judged_call: int = 0

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
    """The peak of the iterations in which ``roles`` are updated.

    Attributes:
        staying: weights, optimizers, averages of all roles.
        gradients: of the roles that are updated.
        kept: activations that wait for a backward pass, of those of the roles whose losses are
            differentiated together (``MethodConfig.turns_apart``); the most at once.
        largest_call: the most that one call adds, whoever is called.
    """

    roles: tuple[str, ...]
    staying: int
    gradients: int
    kept: int
    largest_call: int

    @property
    def total(self) -> int:
        return self.staying + self.gradients + self.kept + self.largest_call


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
    _calls: dict[tuple[RoleSpec, int, bool, bool], CallPlan | None] = field(factory=dict)
    _totals: dict[tuple[RoleSpec, bool, int, int], TensorTotals] = field(factory=dict)
    _sets: Mapping[tuple[str, ...], tuple[tuple[str, ...], ...]] = field(factory=dict)

    def run(self, config: RunConfig) -> RunMemory:
        """Plan every role and every turn."""
        roles = {name: self.role(config, role) for name, role in config.roles.items()}
        sets = self._turns(config)
        heads = {name for name, role in config.roles.items() if role.spec.heads}
        beside = heads | read_by_heads(config)
        return RunMemory(
            roles=roles,
            turns=tuple(
                _turn(turn, groups, roles, judged=bool({*turn} - beside))
                for turn, groups in sets.items()
            ),
        )

    def role(self, config: RunConfig, role: Role, rank: int = 0) -> RoleMemory:
        """Plan one role on process ``rank``; the first holds most."""
        placement = self.placement(config, role)
        totals = self._totals_of(config, role, placement.shards, rank % placement.shards)
        device, host = self._placed(config, role, placement, totals)
        return RoleMemory(
            device=device,
            host=host,
            called=_called(role, placement, totals),
            call=self._call(config, role, placement),
            judged_call=self._judged_call_bytes(config, role, placement),
        )

    def placement(self, config: RunConfig, role: Role) -> RolePlacement:
        """Decide by strategy and policy how a role lies over the processes."""
        distributed = config.training.distributed
        spec = role.spec
        if is_sharded(spec, distributed, self.world_size):
            return RolePlacement(shards=group_size(distributed, self.world_size), sharded=True)
        return RolePlacement()

    def _turns(self, config: RunConfig) -> Mapping[tuple[str, ...], tuple[tuple[str, ...], ...]]:
        """``turns``, counted once: no suggestion changes the method."""
        self._sets = self._sets or turns(config)
        return self._sets

    def plan(self, config: RunConfig, spec: RoleSpec) -> RolePlan:
        """Ask the family for the role's modules, once for roles that are built alike."""
        key = _as_built(spec)
        if key not in self._plans:
            self._plans[key] = config.family_plugin.plan(key, config.pipeline)
        return attrs.evolve(self._plans[key], role=spec.name)

    def _placed(
        self, config: RunConfig, role: Role, placement: RolePlacement, totals: TensorTotals
    ) -> tuple[ResidentBytes, ResidentBytes]:
        """Divide what stays into (on the device, in host memory)."""
        policy = role.spec.fsdp or FsdpPolicy()
        moments = 0 if role.optimizer is None else _MOMENTS[role.optimizer.name]
        resident = ResidentBytes(
            weights=totals.weights,
            gradients=totals.gradients,
            optimizer=totals.trained_fp32 * moments,
            ema=totals.trained_fp32 if role.spec.name in averaged_roles(config) else 0,
        )
        # Buffers are never moved, and not sharded.
        weights = totals.buffers
        if placement.sharded and not policy.reshard_after_forward:
            weights += totals.gathered(policy)
        if placement.sharded and policy.cpu_offload:
            gradients = self._unreduced_gradients(config, policy, totals)
            return ResidentBytes(weights=weights, gradients=gradients), resident
        if role.spec.offload:
            return ResidentBytes(weights=weights), ResidentBytes(weights=resident.weights)
        gradients = resident.gradients
        if placement.sharded:
            gradients = max(gradients, self._unreduced_gradients(config, policy, totals))
        weights += resident.weights
        return attrs.evolve(resident, weights=weights, gradients=gradients), ResidentBytes()

    def _unreduced_gradients(
        self, config: RunConfig, policy: FsdpPolicy, totals: TensorTotals
    ) -> int:
        """Bytes of unsharded gradients, which wait until the last micro step sums them."""
        training = config.training
        if training.distributed.sync_every_micro_step:
            return 0
        several = training.accumulation(self.world_size) > 1
        return totals.full_gradients(policy) if several else 0

    def _totals_of(self, config: RunConfig, role: Role, shards: int, rank: int) -> TensorTotals:
        own = role.spec.base is None
        key = (_as_built(role.spec), own, shards, rank)
        if key not in self._totals:
            plan = self.plan(config, role.spec)
            self._totals[key] = TensorTotals.of(plan, shards=shards, rank=rank, own=own)
        return self._totals[key]

    def _judged_call_bytes(self, config: RunConfig, role: Role, placement: RolePlacement) -> int:
        if role.spec.name not in read_by_heads(config):
            return 0
        call = self._call(config, role, placement, judged=not role.spec.trainable)
        return call.most if call else 0

    def _call(
        self, config: RunConfig, role: Role, placement: RolePlacement, *, judged: bool = False
    ) -> CallPlan | None:
        """Plan one call of the role.

        Args:
            judged: it is not trained, but differentiated by its latents.
        """
        training, spec = config.training, role.spec
        rows = training.global_batch_size // (
            training.accumulation(self.world_size) * self.world_size
        )
        differentiated = spec.trainable or judged
        guided = not differentiated and config.method.needs_negative
        mixed = spec.fsdp.mixed_precision if spec.fsdp and placement.sharded else None
        called = attrs.evolve(
            _as_built(spec),
            fsdp=FsdpPolicy(mixed_precision=mixed) if mixed else None,
            activation_checkpointing=differentiated and spec.activation_checkpointing,
        )
        key = (called, rows, guided, judged)
        if key not in self._calls:
            self._calls[key] = config.family_plugin.plan_call(
                called,
                config.pipeline,
                source=config.source,
                batch=rows,
                guided=guided,
                input_gradient=judged,
            )
        return self._calls[key]


def _as_built(spec: RoleSpec) -> RoleSpec:
    """Return the role without what its modules and sizes do not depend on: the key of its plan.

    An option that is not named here makes a plan of its own, so that a new one is never lost.
    """
    blocks = spec.fsdp.blocks if spec.fsdp else ()
    return attrs.evolve(
        spec,
        name="",
        base=None,
        fsdp=FsdpPolicy(blocks=blocks),
        activation_checkpointing=False,
        compile=None,
        offload=False,
    )


def shard_numel(tensor: TensorPlan, shards: int, rank: int = 0) -> int:
    """Count the elements of ``tensor`` on process ``rank`` of ``shards``.

    FSDP2 cuts dimension 0 into shards of ceil(n / W) rows over W processes: the last ones may get
    fewer, or none.
    """
    rows = tensor.shape[0] if tensor.shape else 1
    each = math.ceil(rows / shards)
    own = max(0, min(each, rows - rank * each))
    return tensor.numel // rows * own if rows else 0


@frozen(kw_only=True)
class TensorTotals:
    """Bytes of one role's tensors, added up.

    Attributes:
        weights: stored on one process: of each tensor a full shard, as FSDP2 pads the last ones.
        called: of these, the largest module's: of two experts one is called at a time.
        gradients: likewise, of what is trained, as wide as it.
        trained_fp32: of what is trained, in fp32, without padding: what an optimizer moment has.
        full: of each block of each module (None: of none), as stored: (bytes, elements).
        trained: likewise, of what is trained.
        buffers: on each process.
    """

    weights: int
    called: int
    gradients: int
    trained_fp32: int
    full: Mapping[_Block, tuple[int, int]]
    trained: Mapping[_Block, tuple[int, int]]
    buffers: int

    @classmethod
    def of(cls, plan: RolePlan, *, shards: int, rank: int, own: bool) -> TensorTotals:
        """Add up the tensors of ``plan``.

        Args:
            own: whether the role has weights of its own; one beside another's has adapters alone.
        """
        trained = [t for m in plan.modules for t in m.tensors if t.trained]
        weights = [
            sum(shard_numel(t, shards) * t.dtype.itemsize for t in m.tensors if own or t.adapter)
            for m in plan.modules
        ]
        return cls(
            weights=sum(weights),
            called=max(weights, default=0),
            gradients=sum(shard_numel(t, shards) * t.dtype.itemsize for t in trained),
            trained_fp32=sum(shard_numel(t, shards, rank) * 4 for t in trained),
            full=_by_block((m.name, t) for m in plan.modules for t in m.tensors),
            trained=_by_block((m.name, t) for m in plan.modules for t in m.tensors if t.trained),
            buffers=sum(m.buffer_bytes for m in plan.modules) if own else 0,
        )

    def gathered(self, policy: FsdpPolicy, *, at_once: int | None = None) -> int:
        """Count the bytes of gathered weights.

        Args:
            at_once: of one module, what is outside of its blocks, and so many of the largest
                blocks; None: everything of all modules.
        """
        sizes = _as_gathered(self.full, policy)
        if at_once is None:
            return sum(sizes.values())
        outside = [nbytes for (_, block), nbytes in sizes.items() if block is None]
        blocks = [nbytes for (_, block), nbytes in sizes.items() if block is not None]
        return max(outside, default=0) + sum(sorted(blocks, reverse=True)[:at_once])

    def full_gradients(self, policy: FsdpPolicy) -> int:
        """Count the bytes of gradients between micro steps that do not sum them over processes."""
        return sum(n for _, n in self.trained.values()) * DTYPES[policy.reduce_precision].itemsize

    def gradients_of_a_block(self, policy: FsdpPolicy) -> int:
        """Count the bytes of the largest block's gradients, as they are computed and as they are
        sent."""
        wide = _as_gathered(self.trained, policy)
        sent = DTYPES[policy.reduce_precision].itemsize
        return max((wide[b] + n * sent for b, (_, n) in self.trained.items()), default=0)


def _by_block(tensors: Iterable[tuple[str, TensorPlan]]) -> dict[_Block, tuple[int, int]]:
    sizes: dict[_Block, tuple[int, int]] = {}
    for module, tensor in tensors:
        nbytes, numel = sizes.get((module, tensor.block), (0, 0))
        sizes[module, tensor.block] = (nbytes + tensor.nbytes, numel + tensor.numel)
    return sizes


def _as_gathered(sizes: Mapping[_Block, tuple[int, int]], policy: FsdpPolicy) -> dict[_Block, int]:
    if policy.mixed_precision is None:
        return {block: nbytes for block, (nbytes, _) in sizes.items()}
    width = DTYPES[policy.mixed_precision].itemsize
    return {block: width * numel for block, (_, numel) in sizes.items()}


def _called(role: Role, placement: RolePlacement, totals: TensorTotals) -> int:
    policy = role.spec.fsdp or FsdpPolicy()
    waiting = totals.called if role.spec.offload else 0
    if not placement.sharded:
        return waiting
    blocks = (
        totals.gathered(policy, at_once=_GATHERED_BLOCKS) if policy.reshard_after_forward else 0
    )
    return waiting + blocks + _GATHERED_BLOCKS * totals.gradients_of_a_block(policy)


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


def turns(config: RunConfig) -> dict[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return each set of roles that are updated in the same iteration, in the order of the first,
    with the groups of it whose losses are differentiated together."""
    steps = range(1, config.training.max_train_steps + 1)
    first: dict[tuple[str, ...], int] = {}
    for step in steps:
        first.setdefault(config.method.turns(step), step)
    return {roles: config.method.turns_apart(step) for roles, step in first.items()}


def _held(roles: Iterable[RoleMemory]) -> int:
    return sum(role.call.held for role in roles if role.call)


def _turn(
    updated: tuple[str, ...],
    groups: Sequence[Sequence[str]],
    roles: Mapping[str, RoleMemory],
    *,
    judged: bool,
) -> Turn:
    """Add up one turn.

    Args:
        groups: of it, those whose losses are differentiated together.
        judged: whether a role is updated whose clips a discriminator judges, if there is one.
    """
    own = [roles[name] for name in updated]
    return Turn(
        roles=updated,
        staying=sum(r.device.total - r.device.gradients for r in roles.values()),
        gradients=sum(r.device.gradients for r in own),
        kept=max((_held(roles[name] for name in group) for group in groups), default=0),
        largest_call=max(
            max(r.in_a_call, r.called + r.judged_call if judged else 0) for r in roles.values()
        ),
    )
