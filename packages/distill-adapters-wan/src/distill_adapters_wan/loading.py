"""Diffusers modules from their folders, strictly: every key, every shape, or an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_protocols import (
    DTYPES,
    LoraSpec,
    ModelBundle,
    RoleHandle,
    RoleSpec,
    WeightsError,
    WeightSource,
)
from distill_protocols.plugins import EMPTY
from torch import Tensor, nn

from distill_adapters_wan.folders import fetch, read_json, transformer_names
from distill_adapters_wan.injection import drawn, inject
from distill_adapters_wan.lora import (
    adapted_layers,
    adapter_names,
    base_name,
    is_adapter,
    target_faults,
)
from distill_adapters_wan.shape import unsupported
from distill_adapters_wan.sources import module_weights, read_in_groups

Module = TypeVar("Module", bound=nn.Module)
_TRANSFORMER = "transformer"


def load_bundle(
    roles: Sequence[RoleSpec],
    *,
    device: torch.device,
    seed: int = 0,
    weights: Mapping[str, Mapping[str, WeightSource]] = EMPTY,
) -> ModelBundle:
    """All roles with their weights; roles of one path share a file, never a tensor.

    Raises:
        WeightsError: as ``load_role``; or ``weights`` has a role that is not among ``roles``.
    """
    names = [role.name for role in roles]
    if stray := sorted(weights.keys() - set(names)):
        raise WeightsError(
            f"weights are given for {', '.join(stray)}, but the roles are {', '.join(names)}; "
            "nobody would take them. Name them after a role"
        )
    return ModelBundle(
        {
            role.name: load_role(
                role, device=device, seed=seed, weights=weights.get(role.name, EMPTY)
            )
            for role in roles
        }
    )


def load_role(
    role: RoleSpec,
    *,
    device: torch.device,
    seed: int = 0,
    weights: Mapping[str, WeightSource] = EMPTY,
) -> RoleHandle:
    """One role: fp32 weights where they train, its own precision (and eval mode) where frozen.

    Within a 16-bit role, what diffusers keeps in fp32 stays so (time embedding, norms,
    scale_shift_table, buffers), and the adapter calls it without autocast: a frozen teacher then
    gives, bit for bit, what ``from_pretrained(torch_dtype=...)`` gives. With all parameters in
    bf16 it was off from that by 0.6 to 0.8 % rms (max 0.06 of 2.2 rms on the tiny taught Wan),
    as much as bf16 itself is off from fp32 (0.7 to 1.1 %). FSDP2 refuses modules of mixed types:
    sharding a frozen 16-bit role needs its weights in fp32 under a mixed-precision policy.

    The base of a LoRA role is such a frozen role, and its adapters are fp32. It starts as the
    frozen role, bit for bit.

    Args:
        seed: A of a LoRA is drawn from it and its own name; nothing from the global generator.
        weights: by module, to take instead of those of the role's path. Of a LoRA role: whole
            ones are the base, adapters alone stand beside the path's base.

    Raises:
        WeightsError: a file or key is missing, unexpected or damaged, or the model is a variant
            that this version does not train.
    """
    folder = fetch(role.path, (_TRANSFORMER,))
    refuse_variant(role.path, folder)
    if stray := sorted(weights.keys() - {_TRANSFORMER}):
        raise WeightsError(
            f"weights are given for {', '.join(stray)} of role {role.name!r}, whose only module "
            f"is {_TRANSFORMER}. Take those of a model with the same modules"
        )
    base, adapters = _sources(role, folder / _TRANSFORMER, weights.get(_TRANSFORMER))
    frozen = not role.trainable or role.lora is not None
    dtype = DTYPES[role.precision] if frozen else torch.float32
    module = build(WanTransformer3DModel, folder / _TRANSFORMER)
    trained = None if role.lora is None else _with_adapters(role, module, role.lora)
    state = _base_state(module, base, dtype=dtype, device=device)
    if trained is not None:
        state |= _adapter_state(role, module, trained, adapters, seed=seed, device=device)
    handle = RoleHandle(
        name=role.name,
        modules={_TRANSFORMER: _filled(module, state, device=device)},
        trainable=role.trainable,
        precision=role.precision,
        fsdp_policy=role.fsdp,
        trained=None if trained is None else {_TRANSFORMER: trained},
    )
    handle.check_training()
    return handle


def _sources(
    role: RoleSpec, folder: Path, given: WeightSource | None
) -> tuple[WeightSource, WeightSource | None]:
    """Where the base and (if anywhere) the adapters come from."""
    if given is None:
        return module_weights(folder), None
    layers = adapter_names(given.facts())
    if not layers:
        return given, None
    if role.lora is None:
        ranks = sorted({given.facts()[a].size[0] for a, _ in layers.values()})
        raise WeightsError(
            f"{given.where} holds LoRA adapters (rank {', '.join(map(str, ranks))}, "
            f"{len(layers)} layers), but role {role.name!r} has no lora, so there is nothing to "
            "put them into. Give the role the same lora, or export that LoRA merged into its "
            "base and start from the export"
        )
    return module_weights(folder), given


def _with_adapters(role: RoleSpec, module: WanTransformer3DModel, lora: LoraSpec) -> frozenset[str]:
    config = dict(module.config)
    for fault in target_faults(config, lora):
        raise WeightsError(f"role {role.name!r}: lora.target_modules: {fault}")
    return inject(module, adapted_layers(config, lora), lora)


def _base_state(
    module: nn.Module, source: WeightSource, *, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Everything but adapters, of ``dtype``, or fp32 where 16 bits harm it."""
    wide = set(module._keep_in_fp32_modules or ())  # type: ignore[arg-type]
    state = module.state_dict()
    own = {base_name(name): name for name in state if not is_adapter(name)}
    check_keys(
        source,
        {theirs: state[name] for theirs, name in own.items()},
        "All keys must match, because a module with leftover random weights trains and looks "
        "healthy. Use weights and config.json of one model",
    )
    weights = {}
    for name, value in read_in_groups(source, own):
        kept = torch.float32 if wide & set(name.split(".")) else dtype
        # Copied: what a source gives may still be the mapped file, or somebody's live module.
        weights[own[name]] = value.to(device=device, dtype=kept, copy=True)
    return weights


def _adapter_state(
    role: RoleSpec,
    module: nn.Module,
    names: frozenset[str],
    source: WeightSource | None,
    *,
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """A and B of every layer in fp32, from ``source`` or as they start."""
    expected = {name: value for name, value in module.state_dict().items() if name in names}
    if source is None:
        return {
            name: drawn(name, value.shape, seed=seed, role=role.name, module=_TRANSFORMER).to(
                device
            )
            for name, value in expected.items()
        }
    check_keys(
        source,
        expected,
        f"Role {role.name!r} has lora of rank {role.lora and role.lora.rank} on "
        f"{len(expected) // 2} layers, and adapters fit no other rank or layers. Give the role "
        "the rank and target_modules of the run that they come from",
    )
    return {
        name: value.to(device=device, dtype=torch.float32, copy=True)
        for name, value in read_in_groups(source, expected)
    }


def refuse_variant(path: str, folder: Path) -> None:
    """Raise ``WeightsError`` for a Wan variant that the adapter would call wrongly."""
    index = read_json(folder / "model_index.json")
    configs = {n: read_json(folder / n / "config.json") for n in transformer_names(folder)}
    for reason in unsupported(configs, bool(index.get("expand_timesteps"))):
        raise WeightsError(f"{path} cannot be used: {reason}")


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
    state = _base_state(module, module_weights(folder), dtype=dtype, device=device)
    return _filled(module, state, device=device)


def _filled(module: Module, state: dict[str, Tensor], *, device: torch.device | str) -> Module:
    """``module`` with the tensors of ``state`` themselves as its weights, in eval mode."""
    module.load_state_dict(state, strict=True, assign=True)
    return module.to(device).eval()


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
    found = {name: facts.size for name, facts in source.facts().items()}
    shapes = [
        f"{key} {list(found[key])} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key] != tuple(value.shape)
    ]
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": shapes,
    }
    said = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in faults.items() if keys]
    if said:
        raise WeightsError(f"{source.where}: the weights do not fit; {'; '.join(said)}. {rule}")


def _some(keys: Sequence[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
