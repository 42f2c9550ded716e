"""Diffusers modules from their folders, strictly: every key, every shape, or an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from attrs import asdict, frozen
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_adapters_wan.architecture import Calling, architecture
from distill_adapters_wan.experts import HIGH, LOW
from distill_adapters_wan.shape import unsupported
from distill_protocols import (
    DTYPES,
    CompileSpec,
    LoraSpec,
    ModelBundle,
    RoleHandle,
    RoleSpec,
    WeightsError,
    WeightSource,
)
from distill_protocols.plugins import EMPTY
from distill_runtime import ALONE, Ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill_diffusers.folders import fetch, read_json, transformer_names
from distill_diffusers.roles.discriminator import HEADS, DrawnHeads, Heads, heads_on_meta
from distill_diffusers.roles.discriminator_rules import head_problems
from distill_diffusers.roles.injection import DrawnAdapters, inject
from distill_diffusers.roles.lora import (
    adapted_layers,
    adapter_names,
    base_name,
    is_adapter,
    target_problems,
)
from distill_diffusers.roles.offload import take_turns
from distill_diffusers.weights.filling import filled, move_buffers
from distill_diffusers.weights.sources import JoinedWeights, module_weights

Module = TypeVar("Module", bound=nn.Module)
_PATIENCE = 1800.0
"""Seconds for another rank to read: one group of weights, or to hash a file of a checkpoint."""
_ALL_OR_NOTHING = (
    "All keys must match, because a module with leftover random weights trains and looks healthy. "
    "Use weights and config.json of one model"
)


def load_bundle(
    roles: Sequence[RoleSpec],
    *,
    device: torch.device,
    seed: int = 0,
    weights: Mapping[str, Mapping[str, WeightSource]] = EMPTY,
    shard: Callable[[RoleHandle], None] = lambda role: None,
    boundary_ratio: float | None = None,
) -> ModelBundle:
    """All roles with their weights; roles of one path share a file, and tensors where ``base``
    says so. All processes of a run call it together.

    Args:
        shard: see ``FamilyPlugin.load``.
        boundary_ratio: see ``load_role``.

    Raises:
        WeightsError: as ``load_role``; ``weights`` has a role that is not among ``roles``; or a
            ``base`` is not one.
    """
    names = [role.name for role in roles]
    if stray := sorted(weights.keys() - set(names)):
        raise WeightsError(
            f"weights are given for {', '.join(stray)}, but the roles are {', '.join(names)}; "
            "nobody would take them. Name them after a role"
        )
    by_name = {role.name: role for role in roles}
    for role in roles:
        if role.base is not None:
            _check_base(role, by_name.get(role.base), weights)
        if role.heads is not None:
            _check_heads(role, by_name.get(role.heads.on))
    loaded: dict[str, RoleHandle] = {}
    with Ranks.temporary(_PATIENCE, error=WeightsError) as ranks:
        for role in sorted(roles, key=lambda role: role.base is not None):  # a base, then guests
            given = weights.get(role.name, EMPTY)
            if role.heads is not None:
                loaded[role.name] = load_heads(
                    role, device=device, seed=seed, weights=given, shard=shard, ranks=ranks
                )
                continue
            loaded[role.name] = load_role(
                role,
                device=device,
                seed=seed,
                weights=given,
                shard=shard,
                base=None if role.base is None else loaded[role.base],
                ranks=ranks,
                boundary_ratio=boundary_ratio,
            )
    take_turns([handle for handle in loaded.values() if handle.discriminator is None], device)
    return ModelBundle({name: loaded[name] for name in names})


def load_role(
    role: RoleSpec,
    *,
    device: torch.device,
    seed: int = 0,
    weights: Mapping[str, WeightSource] = EMPTY,
    shard: Callable[[RoleHandle], None] = lambda role: None,
    base: RoleHandle | None = None,
    ranks: Ranks = ALONE,
    boundary_ratio: float | None = None,
) -> RoleHandle:
    """One role: fp32 weights where they train, its own precision (and eval mode) where frozen.

    Within a 16-bit role, what diffusers keeps in fp32 stays so (time embedding, norms,
    scale_shift_table, buffers), and the adapter calls it without autocast: a frozen teacher then
    gives, bit for bit, what ``from_pretrained(torch_dtype=...)`` gives. With all parameters in
    bf16 it was off from that by 0.6 to 0.8 % rms (max 0.06 of 2.2 rms on the tiny taught Wan),
    as much as bf16 itself is off from fp32 (0.7 to 1.1 %). Such a role can be sharded as it is:
    FSDP2 wants one type among what trains.

    The base of a LoRA role is such a frozen role, and its adapters are fp32. It starts as the
    frozen role, bit for bit.

    With ``base``, its weights are that role's very tensors (of a sharded one, the same parts), and
    only the adapters are its own. Three roles then cost little more than one. The other way to
    that, one module whose adapters are switched between calls, has a mode that every call must set:
    a critic's call within the student's would leave the wrong one behind, and train and eval mode,
    hooks, checkpointed blocks and shards are the module's and so of all roles. Here each role has
    a module of its own, and what is shared is never written.

    Args:
        seed: A of a LoRA is drawn from it and its own name; nothing from the global generator.
        weights: by module, to take instead of those of the role's path. Of a LoRA role: whole
            ones are the base, adapters alone stand beside the path's base. For all or none.
        shard: see ``FamilyPlugin.load``.
        base: the loaded ``role.base``.
        ranks: all of them load together.
        boundary_ratio: the run's own, for two experts whose index has none.

    Raises:
        WeightsError: a file or key is missing, unexpected or damaged, or the model is a variant
            that this version does not train. On all ranks, if on one.
    """
    built = ranks.run_each(lambda: _built(role, weights, boundary_ratio))
    _check_alike(role, built, ranks)
    modules = {name: part.module for name, part in built.parts.items()}
    handle = RoleHandle(
        name=role.name,
        modules={**modules},
        trainable=role.trainable,
        precision=role.precision,
        fsdp_policy=role.fsdp,
        call_options=asdict(built.calling),
        blocks={n: tuple(f"blocks.{i}" for i in range(len(m.blocks))) for n, m in modules.items()},
        offload=role.offload,
        device=torch.device(device),
        trained=None if role.lora is None else {n: p.trained for n, p in built.parts.items()},
    )
    for module in modules.values():
        if role.activation_checkpointing:
            module.enable_gradient_checkpointing()
        if role.compile is not None:
            _compile(module, role.compile)
    shard(handle)
    for part in built.parts.values():
        given = weights.get(part.name)
        _fill(role, part, given, device=device, seed=seed, base=base, ranks=ranks)
    handle.check_training()
    return handle


def load_heads(
    role: RoleSpec,
    *,
    device: torch.device,
    seed: int = 0,
    weights: Mapping[str, WeightSource] = EMPTY,
    shard: Callable[[RoleHandle], None] = lambda role: None,
    ranks: Ranks = ALONE,
) -> RoleHandle:
    """A discriminator: fp32 heads on features of the model at ``role.path``, drawn or given.

    Args:
        seed: they are drawn from it, the role's name and their own; nothing from the global
            generator.
        weights: of the module ``heads``, to take instead.
        shard: see ``FamilyPlugin.load``.

    Raises:
        WeightsError: ``weights`` are of other heads.
    """
    spec = role.heads
    assert spec is not None
    if weights and weights.keys() != {HEADS}:
        raise WeightsError(
            f"weights are given for {', '.join(sorted(weights))} of role {role.name!r}, which is a "
            f"discriminator with the one module {HEADS!r}. Take those of a discriminator"
        )

    def built() -> Heads:
        transformers, _ = architecture(role.path)
        main = transformers[HIGH]
        for problem in head_problems(main, spec):
            where = ".".join(problem.path)
            raise WeightsError(f"role {role.name!r}: heads.{where}: {problem.message}")
        return heads_on_meta(main, spec)

    module = ranks.run_each(built)
    handle = RoleHandle(
        name=role.name,
        modules={HEADS: module},
        trainable=role.trainable,
        precision=role.precision,
        fsdp_policy=role.fsdp,
        device=torch.device(device),
        discriminator=spec,
    )
    shard(handle)
    targets = module.state_dict()

    def source() -> WeightSource:
        if not weights:
            shapes = {name: target.shape for name, target in targets.items()}
            return DrawnHeads(role.name, shapes, seed)
        check_keys(weights[HEADS], targets, "Heads fit heads of the same blocks and width alone")
        return weights[HEADS]

    state = filled(targets, source, ranks=ranks, home=lambda t: _home(role, t, device))
    module.load_state_dict(state, strict=True, assign=True)
    handle.check_training()
    return handle


@frozen(eq=False, kw_only=True)
class _Part:
    """A module of a role, without weights at first.

    Attributes:
        name: in the role.
        folder: of the module.
        trained: names of its adapters.
    """

    name: str
    folder: Path
    module: WanTransformer3DModel
    trained: frozenset[str]


@frozen(eq=False, kw_only=True)
class _Built:
    """A role's modules, by name, and how they are called."""

    calling: Calling
    parts: Mapping[str, _Part]


def _built(
    role: RoleSpec, weights: Mapping[str, WeightSource], boundary_ratio: float | None
) -> _Built:
    # Both, as only the index says whether there is a second; an absent one is simply not fetched.
    folder = fetch(role.path, (HIGH, LOW))
    calling = refuse_variant(role.path, boundary_ratio)
    names = transformer_names(folder)
    if weights and weights.keys() != set(names):
        raise WeightsError(
            f"weights are given for {', '.join(sorted(weights))} of role {role.name!r}, and its "
            f"modules are {', '.join(names)}: one of the two would be another model's, or nobody "
            "would take it. Take those of a model with the same modules"
        )
    return _Built(calling=calling, parts={n: _built_part(role, n, folder / n) for n in names})


def _built_part(role: RoleSpec, name: str, folder: Path) -> _Part:
    module = build(WanTransformer3DModel, folder)
    trained = frozenset() if role.lora is None else _with_adapters(role, module, role.lora)
    narrow = not role.trainable or role.lora is not None
    _cast(module, DTYPES[role.precision] if narrow else torch.float32)
    return _Part(name=name, folder=folder, module=module, trained=trained)


def _fill(
    role: RoleSpec,
    part: _Part,
    given: WeightSource | None,
    *,
    device: torch.device,
    seed: int,
    base: RoleHandle | None,
    ranks: Ranks,
) -> None:
    """Give a module its weights, from ``given`` or from its folder."""
    targets = part.module.state_dict()
    shared = {} if base is None else _shared(role, part.name, targets, base)
    own = {name: target for name, target in targets.items() if name not in shared}
    state = filled(
        own,
        lambda: _source(role, part, own, given, seed=seed),
        ranks=ranks,
        home=lambda target: _home(role, target, device),
    )
    # The tensors themselves become the weights. Not `to(device)` after it: some wait on the CPU.
    part.module.load_state_dict(shared | state, strict=True, assign=True)
    move_buffers(part.module, device)


def _check_alike(role: RoleSpec, built: _Built, ranks: Ranks) -> None:
    numbers = {key: str(value) for key, value in asdict(built.calling).items()}
    for part in built.parts.values():
        facts = dict(part.module.config).items()
        numbers |= {f"{part.name}.{k}": str(v) for k, v in facts if not k.startswith("_")}
    odd = ranks.ranks_that_differ(numbers)
    if odd:
        raise WeightsError(
            f"{role.path} is another model for rank {', '.join(map(str, odd))} than for rank 0: "
            "their config.json or model_index.json differ, and weights of one do not fit the "
            "other. Give all machines the same folder"
        )


def _home(role: RoleSpec, target: Tensor, device: torch.device) -> torch.device:
    policy = role.fsdp
    parked = isinstance(target, DTensor) and policy is not None and policy.cpu_offload
    return torch.device("cpu") if parked or role.offload else device


def _compile(module: WanTransformer3DModel, spec: CompileSpec) -> None:
    module.compile_repeated_blocks(backend=spec.backend, mode=spec.mode, dynamic=spec.dynamic)


# -- where weights come from --------------------------------------------------------------------


def _source(
    role: RoleSpec,
    part: _Part,
    targets: Mapping[str, Tensor],
    given: WeightSource | None,
    *,
    seed: int,
) -> WeightSource:
    """Of all ``targets``, checked by name and shape."""
    base, adapters = _given(role, part.folder, given)
    whole = {base_name(name): name for name in targets if not is_adapter(name)}
    places: dict[str, tuple[WeightSource, str]] = {}
    if whole:
        check_keys(base, {theirs: targets[own] for theirs, own in whole.items()}, _ALL_OR_NOTHING)
        places = {own: (base, theirs) for theirs, own in whole.items()}
    names = {name: target for name, target in targets.items() if is_adapter(name)}
    if adapters is None:
        shapes = {name: target.shape for name, target in names.items()}
        adapters = DrawnAdapters(role.name, part.name, shapes, seed)
    else:
        check_keys(
            adapters,
            names,
            f"Role {role.name!r} has lora of rank {role.lora and role.lora.rank} on "
            f"{len(names) // 2} layers, and adapters fit no other rank or layers. Give the role "
            "the rank and target_modules of the run that they come from",
        )
    return JoinedWeights(base.where, places | {name: (adapters, name) for name in names})


def _given(
    role: RoleSpec, folder: Path, given: WeightSource | None
) -> tuple[WeightSource, WeightSource | None]:
    """Where the base and (if anywhere) the adapters come from."""
    if given is None:
        return module_weights(folder), None
    layers = adapter_names(given.describe())
    if not layers and role.base is not None:
        raise WeightsError(
            f"{given.where} holds whole weights, but those of role {role.name!r} are its base's "
            f"({role.base}), held once. Give adapters alone, or leave out base"
        )
    if not layers:
        return given, None
    if role.lora is None:
        ranks = sorted({given.describe()[a].size[0] for a, _ in layers.values()})
        raise WeightsError(
            f"{given.where} holds LoRA adapters (rank {', '.join(map(str, ranks))}, "
            f"{len(layers)} layers), but role {role.name!r} has no lora, so there is nothing to "
            "put them into. Give the role the same lora, or export that LoRA merged into its "
            "base and start from the export"
        )
    return module_weights(folder), given


# -- one base for several roles -------------------------------------------------------------------


def _check_base(
    role: RoleSpec, base: RoleSpec | None, weights: Mapping[str, Mapping[str, WeightSource]]
) -> None:
    """Raise ``WeightsError`` unless ``base`` can hold the weights of ``role``."""
    if base is None or base.trainable or base.lora is not None or base.name in weights:
        why = "there is no such role"
        if base is not None:
            why = "it is trainable, has lora, or does not start with the weights of its path"
        raise WeightsError(
            f"role {role.name!r} has base {role.base!r}, but {why}; a base is a frozen role whose "
            "weights are those of its path. Name one, or give the role weights of its own"
        )
    if role.lora is None:
        raise WeightsError(
            f"role {role.name!r} has base {role.base!r} and no lora, so nothing of it would be its "
            "own. Give it lora, or leave out base"
        )
    ours = (role.path, role.precision)
    theirs = (base.path, base.precision)
    if ours != theirs or role.offload or base.offload:
        raise WeightsError(
            f"role {role.name!r} is {' in '.join(ours)}, its base {role.base!r} "
            f"{' in '.join(theirs)}; they must be one, and not offloaded, as the weights are held "
            "once. Give both the same path and precision, and leave out offload"
        )


def _check_heads(role: RoleSpec, on: RoleSpec | None) -> None:
    """Raise ``WeightsError`` unless ``on`` can give features to the heads ``role``."""
    assert role.heads is not None
    if on is None or on.heads is not None or on.path != role.path:
        raise WeightsError(
            f"role {role.name!r} is heads on {role.heads.on!r}, which must be another role with a "
            f"model of its own, that of {role.path}. Name one of this run"
        )
    if role.precision != "fp32":
        raise WeightsError(
            f"role {role.name!r} is heads in {role.precision}; they are small, and compute in "
            "fp32. Leave precision out"
        )
    if on.compile is not None:
        raise WeightsError(
            f"role {role.name!r} is heads on {on.name!r}, whose blocks are compiled: each call "
            "that gives features would compile them anew. Leave compile out of that role"
        )


def _shared(
    role: RoleSpec, module: str, targets: Mapping[str, Tensor], base: RoleHandle
) -> dict[str, Tensor]:
    """The base's own tensors under this role's names; of a sharded base its parts."""
    theirs = base.modules[module].state_dict()
    shared = {n: theirs[base_name(n)] for n in targets if not is_adapter(n)}
    odd = [name for name, tensor in shared.items() if _placed(tensor) != _placed(targets[name])]
    if odd:
        raise WeightsError(
            f"role {role.name!r} is spread over processes otherwise than its base {base.name!r} "
            f"({odd[0]}: {_placed(targets[odd[0]])} and {_placed(shared[odd[0]])}), so they cannot "
            "hold one set of weights. Shard both by one policy, or neither"
        )
    return shared


def _placed(tensor: Tensor) -> Any:
    if not isinstance(tensor, DTensor):
        return "whole"
    return tensor.device_mesh, tensor.placements


# -- modules --------------------------------------------------------------------------------------


def _with_adapters(role: RoleSpec, module: WanTransformer3DModel, lora: LoraSpec) -> frozenset[str]:
    config = dict(module.config)
    for problem in target_problems(config, lora):
        raise WeightsError(f"role {role.name!r}: lora.target_modules: {problem}")
    return inject(module, adapted_layers(config, lora), lora)


def refuse_variant(path: str, boundary_ratio: float | None = None) -> Calling:
    """How the model is called; ``WeightsError`` for one that the adapter would call wrongly."""
    configs, calling = architecture(path)
    for reason in unsupported(configs, calling, boundary_ratio):
        raise WeightsError(f"{path} cannot be used: {reason}")
    return calling


def load_module(
    module_class: type[Module],
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Module:
    """A diffusers module in eval mode, with parameters of its own: of ``dtype``, or fp32 where
    its class says that 16 bits harm it.

    Raises:
        WeightsError: naming the file, or every key that is missing, unexpected or of another shape.
    """
    module = build(module_class, folder)
    _cast(module, dtype)
    source = module_weights(folder)
    targets = module.state_dict()
    check_keys(source, targets, _ALL_OR_NOTHING)
    home = torch.device(device)
    state = filled(targets, lambda: source, ranks=ALONE, home=lambda target: home)
    module.load_state_dict(state, strict=True, assign=True)
    move_buffers(module, home)
    return module.eval()


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters, on meta, to ``dtype``; to fp32 adapters, and where 16 bits harm."""
    wide = set(module._keep_in_fp32_modules or ())  # type: ignore[arg-type]
    for name, parameter in module.named_parameters():
        kept = is_adapter(name) or not wide.isdisjoint(name.split("."))
        parameter.data = parameter.data.to(torch.float32 if kept else dtype)


def build(module_class: type[Module], folder: Path) -> Module:
    """The module from ``config.json``: parameters on meta, buffers real.

    Buffers must not go through meta: Wan's rotary tables are in no state dict, so nothing would
    fill them again, and the loaded weights would still compare equal. The global generator is
    left as it was: on their way to meta, Wan's scale_shift_tables are drawn from it.
    """
    return build_from(module_class, read_json(folder / "config.json"), folder / "config.json")


def build_from(module_class: type[Module], config: Mapping[str, Any], where: object) -> Module:
    """``build`` of a configuration that was read already; ``where`` it came from, for messages."""
    try:
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
            return module_class.from_config(dict(config))  # type: ignore[attr-defined]
    except (TypeError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{where} builds no {module_class.__name__}: {error}. It belongs to "
            "another model, or is damaged"
        ) from error


def check_keys(source: WeightSource, expected: Mapping[str, Tensor], rule: str) -> None:
    """Raise ``WeightsError`` unless ``source`` has just the names and shapes of ``expected``.

    The message names what is missing, unexpected and of another shape, and ends with ``rule``.
    """
    found = {name: facts.size for name, facts in source.describe().items()}
    shapes = [
        f"{key} {list(found[key])} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key] != tuple(value.shape)
    ]
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": shapes,
    }
    said = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in problems.items() if keys]
    if said:
        raise WeightsError(f"{source.where}: the weights do not fit; {'; '.join(said)}. {rule}")


def _some(keys: Sequence[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
