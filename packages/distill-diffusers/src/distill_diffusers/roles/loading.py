"""Load roles: models on meta, their adapters and options, shards, then weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from attrs import frozen
from distill_protocols import (
    DTYPES,
    EXIT_EMBEDDING,
    CapabilityError,
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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from distill_diffusers.architecture import (
    Architecture,
    add_target_embedder,
    inspect_model,
    transformer_class,
)
from distill_diffusers.descriptions import ModelDescription, choose_experts
from distill_diffusers.folders import fetch
from distill_diffusers.kinds import EXPERTS, ModelKind
from distill_diffusers.lora import (
    adapted_layers,
    adapter_names,
    base_name,
    is_adapter,
    target_problems,
)
from distill_diffusers.roles import attention
from distill_diffusers.roles.discriminator import (
    HEADS,
    Heads,
    InitialHeads,
    block_problems,
    build_heads,
)
from distill_diffusers.roles.exits import ExitEmbedding, InitialExits, build_exit_embedding
from distill_diffusers.roles.injection import InitialAdapters, inject
from distill_diffusers.roles.offload import offload_between_calls
from distill_diffusers.roles.target_time import with_target_embedder
from distill_diffusers.weights.filling import fill, move_buffers
from distill_diffusers.weights.modules import (
    ALL_OR_NOTHING,
    build_module,
    cast_parameters,
    check_keys,
)
from distill_diffusers.weights.sources import JoinedWeights, module_weights

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

_TIMEOUT = 1800.0
"""Seconds for another rank to read: one group of weights, or to hash a file of a checkpoint."""

Shard: TypeAlias = Callable[[RoleHandle], None]
"""See ``FamilyPlugin.load``."""


def keep_in_one_piece(role: RoleHandle) -> None:
    """Shard nothing."""


@frozen(kw_only=True)
class RoleLoader:
    """Loads roles of one model class.

    Attributes:
        kind: the class.
        describe: gives the description of the model at a path, and raises ``WeightsError`` for a
            model that the family would call wrongly.
    """

    kind: ModelKind
    describe: Callable[[str], ModelDescription]

    def load_bundle(
        self,
        roles: Sequence[RoleSpec],
        *,
        device: torch.device,
        seed: int = 0,
        weights: Mapping[str, Mapping[str, WeightSource]] = EMPTY,
        shard: Shard = keep_in_one_piece,
    ) -> ModelBundle:
        """Load all roles; those with ``base`` share its tensors. All processes call it together.

        Args:
            device: where calls compute.
            seed: see ``load_role``.
            weights: by role and module, to take instead of those of the roles' paths.
            shard: see ``FamilyPlugin.load``.

        Raises:
            WeightsError: as ``load_role``; ``weights`` has a role that is not among ``roles``; or
                a ``base`` is not one.
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
                _check_discriminator(role, by_name.get(role.heads.on))
        loaded: dict[str, RoleHandle] = {}
        with Ranks.temporary(_TIMEOUT, error=WeightsError) as ranks:
            # A base comes before the roles beside it.
            for role in sorted(roles, key=lambda role: role.base is not None):
                own = weights.get(role.name, EMPTY)
                if role.heads is not None:
                    loaded[role.name] = self.load_discriminator(
                        role, device=device, seed=seed, weights=own, shard=shard, ranks=ranks
                    )
                    continue
                loaded[role.name] = self.load_role(
                    role,
                    device=device,
                    seed=seed,
                    weights=own,
                    shard=shard,
                    base=None if role.base is None else loaded[role.base],
                    ranks=ranks,
                )
        models = [handle for handle in loaded.values() if handle.discriminator is None]
        offload_between_calls(models, device)
        return ModelBundle({name: loaded[name] for name in names})

    def load_role(
        self,
        role: RoleSpec,
        *,
        device: torch.device,
        seed: int = 0,
        weights: Mapping[str, WeightSource] = EMPTY,
        shard: Shard = keep_in_one_piece,
        base: RoleHandle | None = None,
        ranks: Ranks = ALONE,
    ) -> RoleHandle:
        """Load one role: fp32 weights if it is trained, its own precision and eval mode if frozen.

        Within a 16-bit role, what diffusers keeps in fp32 stays so (of Wan time embedding, norms,
        scale_shift_table, buffers), and the adapter calls it without autocast: a frozen teacher
        then gives, bit for bit, what ``from_pretrained(torch_dtype=...)`` gives. With all
        parameters in bf16 it was off from that by 0.6 to 0.8 % rms (max 0.06 of 2.2 rms on the
        tiny taught Wan), as much as bf16 itself is off from fp32 (0.7 to 1.1 %). Such a role can
        be sharded as it is: FSDP2 wants one type among what trains.

        The base of a LoRA role is such a frozen role, and its adapters are fp32. It starts as the
        frozen role, bit for bit.

        With ``base``, its weights are that role's very tensors (of a sharded one, the same parts),
        and only the adapters are its own. Three roles then cost little more than one. The
        alternative, one module whose adapters are switched between calls, has a mode that every
        call must set: a critic's call within the student's would leave the wrong one behind, and
        train and eval mode, hooks, checkpointed blocks and shards are the module's and so of all
        roles. Here each role has a module of its own, and what is shared is never written.

        Args:
            device: where calls compute.
            seed: A of a LoRA is drawn from it and its own name; nothing from the global generator.
            weights: by module, to take instead of those of the role's path. Of a LoRA role: whole
                ones are the base, adapters alone stand beside the path's base. For all or none.
            shard: see ``FamilyPlugin.load``.
            base: the loaded ``role.base``.
            ranks: all of them load together.

        Raises:
            WeightsError: a file or key is missing, unexpected or damaged, the model is a variant
                that the family does not train, or its class lacks an option. On all ranks, if on
                one.
        """
        built = ranks.run_each(lambda: self._build(role, weights))
        _check_alike(role, built, ranks)
        modules = {name: part.module for name, part in built.parts.items()}
        exits = {} if built.exits is None else {EXIT_EMBEDDING: built.exits}
        handle = RoleHandle(
            name=role.name,
            modules={**modules, **exits},
            trainable=role.trainable,
            precision=role.precision,
            fsdp_policy=role.fsdp,
            call_options=built.call_options,
            blocks={name: part.architecture.blocks for name, part in built.parts.items()},
            offload=role.offload,
            device=torch.device(device),
            trained=None
            if role.lora is None
            else {n: p.trained for n, p in built.parts.items()}
            | {name: frozenset(module.state_dict()) for name, module in exits.items()},
        )
        for name, module in modules.items():
            if role.attention_backend is not None:
                attention.set_backend(module, role.attention_backend)
                ranks.run_each(partial(_check_backend, role, module, device))
            if role.activation_checkpointing:
                module.enable_gradient_checkpointing()
            if role.compile is not None:
                for block in handle.blocks[name]:
                    module.get_submodule(block).compile(
                        backend=role.compile.backend,
                        mode=role.compile.mode,
                        dynamic=role.compile.dynamic,
                    )
        shard(handle)
        for part in built.parts.values():
            _fill(
                role,
                part,
                weights.get(part.name),
                kind=self.kind,
                device=device,
                seed=seed,
                base=base,
                ranks=ranks,
            )
        if built.exits is not None:
            shapes = {name: value.shape for name, value in built.exits.state_dict().items()}
            _fill_small(
                role,
                built.exits,
                weights.get(EXIT_EMBEDDING),
                InitialExits(role.name, shapes),
                "An embedding fits as many exit steps alone: the method's own, of its sampler",
                device=device,
                ranks=ranks,
            )
        handle.check_training()
        return handle

    def load_discriminator(
        self,
        role: RoleSpec,
        *,
        device: torch.device,
        seed: int = 0,
        weights: Mapping[str, WeightSource] = EMPTY,
        shard: Shard = keep_in_one_piece,
        ranks: Ranks = ALONE,
    ) -> RoleHandle:
        """Load fp32 heads on features of the model at ``role.path``, drawn or given.

        Args:
            device: where they compute.
            seed: they are drawn from it, the role's name and their own; nothing from the global
                generator.
            weights: of the module ``heads``, to take instead.
            shard: see ``FamilyPlugin.load``.
            ranks: all of them load together.

        Raises:
            WeightsError: ``weights`` are of other heads, or the model has not these blocks.
        """
        spec = role.heads
        assert spec is not None
        if weights and weights.keys() != {HEADS}:
            raise WeightsError(
                f"weights are given for {', '.join(sorted(weights))} of role {role.name!r}, which "
                f"is a discriminator with the one module {HEADS!r}. Take those of a discriminator"
            )

        def build() -> Heads:
            architecture = inspect_model(self.kind, self.describe(role.path).main)
            for problem in block_problems(spec, len(architecture.blocks)):
                where = ".".join(problem.path)
                raise WeightsError(f"role {role.name!r}: heads.{where}: {problem.message}")
            return build_heads(architecture.width, spec)

        module = ranks.run_each(build)
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
        shapes = {name: value.shape for name, value in module.state_dict().items()}
        _fill_small(
            role,
            module,
            weights.get(HEADS),
            InitialHeads(role.name, shapes, seed),
            "Heads fit heads of the same blocks and width alone",
            device=device,
            ranks=ranks,
        )
        handle.check_training()
        return handle

    def _build(self, role: RoleSpec, weights: Mapping[str, WeightSource]) -> _Built:
        # All names, as only the index states which there are; absent ones are simply not fetched.
        folder = fetch(role.path, role.experts or self.kind.modules)
        description = choose_experts(self.describe(role.path), role)
        names = tuple(description.transformers)
        # Another run's checkpoint may hold more experts than this role has.
        # And a critic's an embedding of exit steps, without which its transformers are a model too.
        given = weights.keys() & set(names) if role.experts else weights.keys() - {EXIT_EMBEDDING}
        if weights and given != set(names):
            raise WeightsError(
                f"weights are given for {', '.join(sorted(weights))} of role {role.name!r}, and "
                f"its modules are {', '.join(names)}: one of the two would be another model's, or "
                "nobody would take it. Take those of a model with the same modules"
            )
        parts = {name: self._build_part(role, name, folder / name) for name in names}
        options = {**description.call_options, **({EXPERTS: names} if role.experts else {})}
        exits = None
        if role.exits is not None:
            # Experts are built alike.
            exits = build_exit_embedding(self.kind, parts[names[0]].architecture, role.exits)
        return _Built(call_options=options, parts=parts, exits=exits)

    def _build_part(self, role: RoleSpec, name: str, folder: Path) -> _Part:
        module = build_module(transformer_class(self.kind), folder)
        if role.activation_checkpointing and not module._supports_gradient_checkpointing:
            raise WeightsError(
                f"role {role.name!r} has activation_checkpointing, and diffusers has none for "
                f"{type(module).__name__}. Leave it out"
            )
        if role.target_time is not None:
            embedders = self.kind.time_embedder, self.kind.target_embedder
            add_target_embedder(module, *embedders, role.target_time.gate)
        architecture = inspect_model(self.kind, dict(module.config))
        trained: frozenset[str] = frozenset()
        if role.lora is not None:
            trained = self._add_adapters(role, module, architecture, role.lora)
        is_frozen = not role.trainable or role.lora is not None
        cast_parameters(module, DTYPES[role.precision] if is_frozen else torch.float32)
        return _Part(
            name=name, folder=folder, module=module, architecture=architecture, trained=trained
        )

    def _add_adapters(
        self, role: RoleSpec, module: ModelMixin, architecture: Architecture, lora: LoraSpec
    ) -> frozenset[str]:
        for problem in target_problems(architecture, lora, self.kind.foreign_layers):
            raise WeightsError(f"role {role.name!r}: lora.target_modules: {problem}")
        return inject(module, adapted_layers(architecture, lora), lora)


@frozen(eq=False, kw_only=True)
class _Part:
    """A module of a role, without weights at first.

    Attributes:
        name: in the role.
        folder: of the module.
        trained: names of its adapters' parameters.
    """

    name: str
    folder: Path
    module: ModelMixin
    architecture: Architecture
    trained: frozenset[str]


@frozen(eq=False, kw_only=True)
class _Built:
    """A role's transformers, by name, how they are called, and its embedding of exit steps."""

    call_options: Mapping[str, object]
    parts: Mapping[str, _Part]
    exits: ExitEmbedding | None


def _fill(
    role: RoleSpec,
    part: _Part,
    given: WeightSource | None,
    *,
    kind: ModelKind,
    device: torch.device,
    seed: int,
    base: RoleHandle | None,
    ranks: Ranks,
) -> None:
    """Give a module its weights, from ``given`` or from its folder."""
    targets = part.module.state_dict()
    shared = {} if base is None else _shared(role, part.name, targets, base)
    own = {name: target for name, target in targets.items() if name not in shared}
    state = fill(
        own,
        lambda: _source(role, part, own, given, kind=kind, seed=seed),
        ranks=ranks,
        device_of=lambda target: _storage_device(role, target, device),
    )
    # The tensors themselves become the weights. Not `to(device)` after it: some wait on the CPU.
    part.module.load_state_dict(shared | state, strict=True, assign=True)
    move_buffers(part.module, device)
    if role.lora is not None:
        _leave_buffers_to_the_base(part.module)


def _fill_small(
    role: RoleSpec,
    module: nn.Module,
    given: WeightSource | None,
    initial: WeightSource,
    rule: str,
    *,
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Give a module of this package's own its weights: those that are given, or its first values.

    Args:
        rule: ends the message where ``given`` is of another such module.
    """
    targets = module.state_dict()

    def source() -> WeightSource:
        if given is None:
            return initial
        check_keys(given, targets, rule)
        return given

    state = fill(targets, source, ranks=ranks, device_of=lambda t: _storage_device(role, t, device))
    module.load_state_dict(state, strict=True, assign=True)


def _leave_buffers_to_the_base(module: nn.Module) -> None:
    """Take stored buffers (SD 3's table of positions) out of the state dict of a LoRA role.

    They are of the base, which is read from the role's path. In the state dict they would be part
    of what training moves (``RoleHandle.moving_state``): each checkpoint would hold them, and
    adapters read from it would be refused for the tensors beside them.
    """
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            part.register_buffer(name, buffer, persistent=False)


def _check_backend(role: RoleSpec, module: ModelMixin, device: torch.device) -> None:
    assert role.attention_backend is not None
    try:
        attention.check_backend(
            role.attention_backend,
            torch.device(device),
            role.precision,
            head_width=attention.head_width(module),
            trainable=role.trainable,
        )
    except CapabilityError as error:
        raise CapabilityError(f"role {role.name!r}: {error}") from error


def _check_alike(role: RoleSpec, built: _Built, ranks: Ranks) -> None:
    """Raise ``WeightsError`` unless all ranks read the same configurations."""
    numbers = {key: str(value) for key, value in built.call_options.items()}
    for part in built.parts.values():
        entries = dict(part.module.config).items()
        numbers |= {f"{part.name}.{k}": str(v) for k, v in entries if not k.startswith("_")}
    odd = ranks.ranks_that_differ(numbers)
    if odd:
        raise WeightsError(
            f"{role.path} is another model for rank {', '.join(map(str, odd))} than for rank 0: "
            "their config.json or model_index.json differ, and weights of one do not fit the "
            "other. Give all machines the same folder"
        )


def _storage_device(role: RoleSpec, target: Tensor, device: torch.device) -> torch.device:
    """Give the device that a weight is kept on between calls."""
    policy = role.fsdp
    parked = isinstance(target, DTensor) and policy is not None and policy.cpu_offload
    return torch.device("cpu") if parked or role.offload else device


# -- where weights come from --------------------------------------------------------------------


def _source(
    role: RoleSpec,
    part: _Part,
    targets: Mapping[str, Tensor],
    given: WeightSource | None,
    *,
    kind: ModelKind,
    seed: int,
) -> WeightSource:
    """Give the weights of all ``targets``, checked by name and shape."""
    base, adapters = _base_and_adapters(role, part.folder, given)
    if role.target_time is not None:
        base = with_target_embedder(kind, base)
    whole = {base_name(name): name for name in targets if not is_adapter(name)}
    places: dict[str, tuple[WeightSource, str]] = {}
    if whole:
        check_keys(base, {theirs: targets[own] for theirs, own in whole.items()}, ALL_OR_NOTHING)
        places = {own: (base, theirs) for theirs, own in whole.items()}
    names = {name: target for name, target in targets.items() if is_adapter(name)}
    if adapters is None:
        shapes = {name: target.shape for name, target in names.items()}
        adapters = InitialAdapters(role.name, part.name, shapes, seed)
    else:
        check_keys(
            adapters,
            names,
            f"Role {role.name!r} has lora of rank {role.lora and role.lora.rank} on "
            f"{len(names) // 2} layers, and adapters fit no other rank or layers. Give the role "
            "the rank and target_modules of the run that they come from",
        )
    return JoinedWeights(base.where, places | {name: (adapters, name) for name in names})


def _base_and_adapters(
    role: RoleSpec, folder: Path, given: WeightSource | None
) -> tuple[WeightSource, WeightSource | None]:
    """Say where the base and, unless they are drawn, the adapters come from."""
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
    differ = [
        f"{name} is {getattr(role, name)} and of {role.base!r} {getattr(base, name)}"
        for name in ("path", *RoleSpec.of_weights())
        if getattr(role, name) != getattr(base, name)
    ]
    if role.offload or base.offload:
        differ.append("one of them is offloaded")
    if differ:
        raise WeightsError(
            f"role {role.name!r} cannot be beside the weights of {role.base!r}: "
            f"{'; '.join(differ)}. The weights are held once, so both must have the same path, "
            f"{' and '.join(RoleSpec.of_weights())}, and no offload"
        )


def _check_discriminator(role: RoleSpec, on: RoleSpec | None) -> None:
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
    """Give the base's own tensors under this role's names; of a sharded base its parts."""
    weights = base.modules[module].state_dict()
    shared = {n: weights[base_name(n)] for n in targets if not is_adapter(n)}
    odd = [
        name for name, tensor in shared.items() if _placement(tensor) != _placement(targets[name])
    ]
    if odd:
        own, theirs = _placement(targets[odd[0]]), _placement(shared[odd[0]])
        raise WeightsError(
            f"role {role.name!r} is spread over processes otherwise than its base {base.name!r} "
            f"({odd[0]}: {own} and {theirs}), so they cannot hold one set of weights. Shard both "
            "by one policy, or neither"
        )
    return shared


def _placement(tensor: Tensor) -> str | tuple[DeviceMesh, tuple[Placement, ...]]:
    if not isinstance(tensor, DTensor):
        return "whole"
    return tensor.device_mesh, tensor.placements
