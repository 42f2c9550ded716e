"""Modules that need not exist: what they are made of, from the meta device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_adapters_wan.experts import HIGH
from distill_protocols import DTYPES, ModulePlan, RoleSpec, TensorPlan, WeightsError
from torch import nn

from distill_diffusers.roles.discriminator import plan_heads
from distill_diffusers.roles.lora import adapted_layers, is_adapter, names_of
from distill_diffusers.weights.derived import stays_wide

BLOCKS = ("blocks",)
"""The module lists whose entries are sharded one at a time, where a policy names no others."""


def plan_modules(
    transformers: Mapping[str, Mapping[str, Any]], role: RoleSpec
) -> tuple[ModulePlan, ...]:
    """One plan a transformer; the keys are module names, the values their configurations. Of a
    discriminator, one of its heads."""
    if role.heads is not None:
        return (plan_heads(transformers[HIGH], role),)
    return tuple(plan_module(name, config, role) for name, config in transformers.items())


def plan_module(name: str, config: Mapping[str, Any], role: RoleSpec) -> ModulePlan:
    """Parameters of one transformer, and the adapters of ``role.lora``, as ``load_role`` makes
    them.

    Raises:
        WeightsError: the configuration builds no Wan transformer, or it has no module list of a
            name in ``role.fsdp.blocks``.
    """
    module = on_meta(config, name)
    facts = module.config
    width = facts.num_attention_heads * facts.attention_head_dim
    lists = (role.fsdp and role.fsdp.blocks) or BLOCKS
    return ModulePlan(
        name=name,
        architecture=f"WanTransformer3DModel, {facts.num_layers} layers of width {width}",
        tensors=tuple(_tensors(module, role, _units(module, lists))),
        buffers=sum(b.numel() for b in module.buffers()),
        buffer_bytes=sum(b.nbytes for b in module.buffers()),
    )


def on_meta(config: Mapping[str, Any], where: str) -> Any:
    """The transformer of ``config`` on the meta device, buffers too.

    Raises:
        WeightsError: it builds none.
    """
    try:
        with torch.device("meta"):
            return WanTransformer3DModel.from_config(dict(config))
    except (TypeError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{where}: its configuration builds no WanTransformer3DModel ({error}); it belongs to "
            "another model"
        ) from error


def stored_dtype(name: str, role: RoleSpec) -> torch.dtype:
    """In which ``load_role`` keeps the parameter ``name``."""
    frozen = not role.trainable or role.lora is not None
    narrow = frozen and not is_adapter(name) and not stays_wide(name)
    return DTYPES[role.precision] if narrow else torch.float32


def _tensors(module: Any, role: RoleSpec, units: Collection[str]) -> Iterator[TensorPlan]:
    layers = {} if role.lora is None else adapted_layers(dict(module.config), role.lora)
    for plain, value in module.named_parameters():
        layer, _, end = plain.rpartition(".")
        name = f"{layer}.base_layer.{end}" if layer in layers else plain
        yield TensorPlan(
            name=name,
            shape=tuple(value.shape),
            dtype=stored_dtype(name, role),
            block=_unit(plain, units),
            trained=role.trainable and role.lora is None,
        )
    for layer, (inputs, outputs) in layers.items():
        assert role.lora is not None
        shapes = (role.lora.rank, inputs), (outputs, role.lora.rank)
        for name, shape in zip(names_of(layer), shapes, strict=True):
            yield TensorPlan(
                name=name,
                shape=shape,
                dtype=stored_dtype(name, role),
                block=_unit(layer, units),
                trained=role.trainable,
                adapter=True,
            )


def _units(module: nn.Module, lists: Collection[str]) -> frozenset[str]:
    """Names of the entries of the module lists ``lists``."""
    there = {name: m for name, m in module.named_modules() if isinstance(m, nn.ModuleList)}
    unknown = sorted(set(lists) - there.keys())
    if unknown:
        raise WeightsError(
            f"fsdp.blocks: there is no module list {', '.join(unknown)} in this model, so nothing "
            f"would be gathered by it. Its longest is {max(there, key=lambda n: len(there[n]))!r}"
        )
    return frozenset(f"{name}.{i}" for name in lists for i in range(len(there[name])))


def _unit(name: str, units: Collection[str]) -> str | None:
    """The innermost of ``units`` that the parameter or layer ``name`` lies in."""
    parts = name.split(".")
    ends = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
    return next((end for end in ends if end in units), None)
