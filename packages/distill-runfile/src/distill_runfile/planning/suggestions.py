"""What would make a run fit: changes of its file, each planned anew. Nothing is guessed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
from attrs import frozen
from distill_protocols import FsdpPolicy, LoraSpec

from distill_runfile.planning.memory import Planner, RunMemory
from distill_runfile.planning.placement import strategy_of
from distill_runfile.roles import FROM_BASE
from distill_runfile.schema import Role, RunConfig

_COMBINED = 2
"""Up to so many changes, every combination is planned; of more, the best is added each time."""
_LORA_RANK = 64


@frozen(kw_only=True, eq=False)
class Change:
    """One line of a run file.

    Attributes:
        line: as it would stand in the file, keys joined by dots.
        apply: the run with it; None where it changes nothing, or breaks a rule of run files.
    """

    line: str
    apply: Callable[[RunConfig], RunConfig | None]


@frozen(kw_only=True)
class Suggestion:
    """A change and what it does to the peak on the device, in bytes."""

    line: str
    saves: int


@frozen(kw_only=True)
class Fitting:
    """The fewest lines that make the run fit, and what it takes then."""

    lines: tuple[str, ...]
    memory: RunMemory


def suggestions(config: RunConfig, planner: Planner) -> list[Suggestion]:
    """List the changes that help by themselves, the mildest first."""
    before = planner.run(config).peak
    helpful = []
    for change in _changes(config, planner):
        changed = change.apply(config)
        saves = 0 if changed is None else before - planner.run(changed).peak
        if saves > 0:
            helpful.append(Suggestion(line=change.line, saves=saves))
    return helpful


def fitting(config: RunConfig, planner: Planner, size: int) -> Fitting | None:
    """Find the fewest changes under which the peak is at most ``size`` bytes; None: there are none.

    Of equally many, the mildest. Beyond ``_COMBINED``, none of them can be left out.
    """
    changes = list(_changes(config, planner))

    def plan(some: Sequence[Change]) -> RunMemory | None:
        changed = _all(config, some)
        return None if changed is None else planner.run(changed)

    for count in range(1, _COMBINED + 1):
        for some in itertools.combinations(changes, count):
            memory = plan(some)
            if memory is not None and memory.peak <= size:
                return Fitting(lines=tuple(c.line for c in some), memory=memory)
    return _descent(changes, plan, size)


def _descent(
    changes: Sequence[Change], plan: Callable[[Sequence[Change]], RunMemory | None], size: int
) -> Fitting | None:
    """Add the change that saves most until it fits; then leave out what is not needed, the
    harshest first."""
    kept: list[Change] = []
    memory = plan(kept)
    assert memory is not None
    while memory.peak > size:
        # In their order, as some only apply after others: those of shards after sharding.
        longer = [[c for c in changes if c in kept or c is new] for new in changes]
        better = [(m, some) for some in longer if (m := plan(some)) and m.peak < memory.peak]
        if not better:
            return None
        memory, kept = min(better, key=lambda pair: pair[0].peak)
    while True:
        fewer = [[c for c in kept if c is not left_out] for left_out in reversed(kept)]
        enough = ((m, some) for some in fewer if (m := plan(some)) and m.peak <= size)
        shorter = next(enough, None)
        if shorter is None:
            return Fitting(lines=tuple(c.line for c in kept), memory=memory)
        memory, kept = shorter


def _all(config: RunConfig, changes: Sequence[Change]) -> RunConfig | None:
    changed: RunConfig | None = config
    for change in changes:
        changed = None if changed is None else change.apply(changed)
    return changed


# -- the changes, from those that cost nothing to those that change what is trained ---------------


def _changes(config: RunConfig, planner: Planner) -> Iterator[Change]:
    yield Change(
        line="training.distributed: {strategy: fsdp2}", apply=lambda c: _use_fsdp2(c, planner)
    )
    yield Change(
        line="training.distributed.sync_every_micro_step: true", apply=_sync_every_micro_step
    )
    mild = (_checkpoint_activations, _compute_in_16_bits, _gather_in_16_bits)
    harsh = (_offload_between_calls, _offload_shards, _beside_a_base)
    # Heads are small, fp32, and have none of these keys.
    models = [name for name, role in config.roles.items() if role.spec.heads is None]
    yield from (
        kind(config, name, planner)
        for kind in (_reshard_after_forward, _shard)
        for name in config.roles
    )
    yield from (kind(config, name, planner) for kind in mild for name in models)
    yield from _smaller_batches(config, planner)
    yield from (kind(config, name, planner) for kind in harsh for name in models)


def _use_fsdp2(config: RunConfig, planner: Planner) -> RunConfig | None:
    distributed = config.training.distributed
    if planner.world_size == 1 or strategy_of(distributed, planner.world_size) == "fsdp2":
        return None
    changed = _with_training(
        config, distributed=attrs.evolve(distributed, strategy="fsdp2", shard_size=None)
    )
    roles = changed.roles.values()
    refused = any(r.spec.offload and planner.placement(changed, r).sharded for r in roles)
    return None if refused else changed


def _sync_every_micro_step(config: RunConfig) -> RunConfig | None:
    distributed = config.training.distributed
    if distributed.sync_every_micro_step or distributed.strategy not in ("fsdp2", "hsdp"):
        return None
    return _with_training(config, distributed=attrs.evolve(distributed, sync_every_micro_step=True))


def _reshard_after_forward(_: RunConfig, name: str, planner: Planner) -> Change:
    def apply(config: RunConfig) -> RunConfig | None:
        policy = config.roles[name].spec.fsdp
        if policy is None or policy.reshard_after_forward:
            return None
        return _with_policy(config, name, planner, reshard_after_forward=True)

    return Change(line=f"models.{name}.fsdp.reshard_after_forward: true", apply=apply)


def _shard(_: RunConfig, name: str, planner: Planner) -> Change:
    def apply(config: RunConfig) -> RunConfig | None:
        role = config.roles[name]
        strategy = strategy_of(config.training.distributed, planner.world_size)
        # What trains beside a base is whole under ddp, so the base must be, too.
        shared = strategy == "ddp" and any(r.spec.base == name for r in config.roles.values())
        if role.spec.base or role.spec.offload or shared or planner.placement(config, role).sharded:
            return None
        policy = attrs.evolve(role.spec.fsdp or FsdpPolicy(), shard=True)
        changed = _with_spec(config, name, fsdp=policy)
        if changed is None:
            return None
        return changed if planner.placement(changed, changed.roles[name]).sharded else None

    return Change(line=f"models.{name}.fsdp.shard: true", apply=apply)


def _checkpoint_activations(_: RunConfig, name: str, planner: Planner) -> Change:
    def apply(config: RunConfig) -> RunConfig | None:
        spec = config.roles[name].spec
        if not spec.trainable or spec.activation_checkpointing:
            return None
        return _with_spec(config, name, activation_checkpointing=True)

    return Change(line=f"models.{name}.activation_checkpointing: true", apply=apply)


def _compute_in_16_bits(_: RunConfig, name: str, planner: Planner) -> Change:
    def apply(config: RunConfig) -> RunConfig | None:
        spec = config.roles[name].spec
        if spec.base or spec.precision != "fp32":
            return None
        return _with_spec(config, name, precision="bf16")

    return Change(line=f"models.{name}.precision: bf16", apply=apply)


def _gather_in_16_bits(_: RunConfig, name: str, planner: Planner) -> Change:
    def apply(config: RunConfig) -> RunConfig | None:
        spec = config.roles[name].spec
        if spec.precision != "bf16" or (spec.fsdp and spec.fsdp.mixed_precision):
            return None
        return _with_policy(config, name, planner, mixed_precision="bf16")

    return Change(line=f"models.{name}.fsdp.mixed_precision: bf16", apply=apply)


def _smaller_batches(config: RunConfig, planner: Planner) -> Iterator[Change]:
    """Half as many clips a call as often as it divides, and one."""
    training = config.training
    share = training.global_batch_size // planner.world_size
    now = training.batch_size_per_device or share
    smaller = [size for size in range(1, now) if share % size == 0]
    for size in sorted({*(s for s in smaller if s * 2 >= now), *smaller[:1]}, reverse=True):
        yield Change(
            line=f"training.batch_size_per_device: {size}",
            apply=lambda c, size=size: (
                _with_training(c, batch_size_per_device=size)
                if size < (c.training.batch_size_per_device or share)
                else None
            ),
        )


def _offload_between_calls(_: RunConfig, name: str, planner: Planner) -> Change:
    def apply(config: RunConfig) -> RunConfig | None:
        role = config.roles[name]
        shared = role.spec.base or any(r.spec.base == name for r in config.roles.values())
        sharded = planner.placement(config, role).sharded or (
            role.spec.fsdp and role.spec.fsdp.shard
        )
        if role.spec.trainable or role.spec.offload or shared or sharded:
            return None
        return _with_spec(config, name, offload=True)

    return Change(line=f"models.{name}.offload: true", apply=apply)


def _offload_shards(_: RunConfig, name: str, planner: Planner) -> Change:
    def apply(config: RunConfig) -> RunConfig | None:
        policy = config.roles[name].spec.fsdp
        if policy is not None and policy.cpu_offload:
            return None
        return _with_policy(config, name, planner, cpu_offload=True)

    return Change(line=f"models.{name}.fsdp.cpu_offload: true", apply=apply)


def _beside_a_base(config: RunConfig, name: str, planner: Planner) -> Change:
    """Low-rank adapters beside the weights of a frozen role of the same path."""
    path = config.roles[name].spec.path
    base = next((n for n, r in config.roles.items() if _is_base(r) and r.spec.path == path), "")

    def apply(config: RunConfig) -> RunConfig | None:
        role = config.roles[name]
        frozen = config.roles.get(base)
        if not role.spec.trainable or role.spec.lora or role.init_from or frozen is None:
            return None
        whole = planner.world_size > 1 and not planner.placement(config, role).sharded
        if frozen.spec.offload or (whole and frozen.spec.fsdp is not None):
            return None
        return _with_spec(
            config,
            name,
            base=base,
            lora=LoraSpec(rank=_LORA_RANK),
            precision=frozen.spec.precision,
            fsdp=frozen.spec.fsdp,
        )

    line = f"models.{name}: {{base: {base}, lora: {{rank: {_LORA_RANK}}}}}"
    return Change(line=f"{line}, in place of path", apply=apply)


def _is_base(role: Role) -> bool:
    spec = role.spec
    return not (spec.trainable or spec.lora or spec.base or role.init_from)


def _with_training(config: RunConfig, **changes: Any) -> RunConfig:
    return attrs.evolve(config, training=attrs.evolve(config.training, **changes))


def _with_policy(
    config: RunConfig, name: str, planner: Planner, **changes: Any
) -> RunConfig | None:
    """None where it would have no effect: the role is not sharded, or its base decides it."""
    role = config.roles[name]
    if role.spec.base or not planner.placement(config, role).sharded:
        return None
    return _with_spec(config, name, fsdp=attrs.evolve(role.spec.fsdp or FsdpPolicy(), **changes))


def _with_spec(config: RunConfig, name: str, **changes: Any) -> RunConfig | None:
    """Change the role, and what roles beside its weights take over from it.

    None: the family does not honour one of these options.
    """
    honoured = {"precision", *config.family_plugin.role_options(config.pipeline)}
    if not changes.keys() <= honoured:
        return None
    shared = {key: changes[key] for key in FROM_BASE if key in changes}
    roles = {
        other: attrs.evolve(
            role, spec=attrs.evolve(role.spec, **(changes if other == name else shared))
        )
        if other == name or role.spec.base == name
        else role
        for other, role in config.roles.items()
    }
    return attrs.evolve(config, roles=roles)
