"""The parameters of a role as they will be loaded, from the meta device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from distill_protocols import DTYPES, ModulePlan, RoleSpec, TensorPlan, WeightsError

from distill_diffusers.architecture import Architecture, inspect_model, is_kept_in_fp32
from distill_diffusers.descriptions import ModelDescription
from distill_diffusers.kinds import ModelKind
from distill_diffusers.lora import adapted_layers, is_adapter, names_of
from distill_diffusers.roles.discriminator import plan_heads
from distill_diffusers.roles.exits import plan_exit_embedding


def plan_modules(
    kind: ModelKind, model: ModelDescription, role: RoleSpec
) -> tuple[ModulePlan, ...]:
    """Plan each transformer of ``model`` and the role's embedding of exit steps; of a
    discriminator, its heads."""
    if role.heads is not None:
        return (plan_heads(inspect_model(kind, model.main).width, role),)
    transformers = tuple(
        plan_module(kind, name, config, role) for name, config in model.transformers.items()
    )
    if role.exits is None:
        return transformers
    architecture = inspect_model(kind, model.main)
    return (*transformers, plan_exit_embedding(kind, architecture, role))


def plan_module(
    kind: ModelKind, name: str, config: Mapping[str, object], role: RoleSpec
) -> ModulePlan:
    """List the parameters of one transformer, and the adapters of ``role.lora``, as
    ``RoleLoader.load_role`` makes them.

    Raises:
        WeightsError: the configuration builds no such transformer, or it has no module list of a
            name in ``role.fsdp.blocks``.
    """
    architecture = inspect_model(kind, config)
    lists = (role.fsdp and role.fsdp.blocks) or architecture.block_lists
    blocks = frozenset(architecture.entries(*_known_lists(architecture, lists)))
    return ModulePlan(
        name=name,
        architecture=(
            f"{architecture.class_name}, {len(architecture.blocks)} layers of width "
            f"{architecture.width}"
        ),
        tensors=tuple(_tensors(architecture, role, blocks)),
        buffers=architecture.buffers,
        buffer_bytes=architecture.buffer_bytes,
    )


def stored_dtype(name: str, role: RoleSpec, kept_in_fp32: frozenset[str]) -> torch.dtype:
    """Give the type in which ``RoleLoader.load_role`` keeps the parameter ``name``."""
    is_frozen = not role.trainable or role.lora is not None
    if not is_frozen or is_adapter(name) or is_kept_in_fp32(name, kept_in_fp32):
        return torch.float32
    return DTYPES[role.precision]


def _tensors(
    architecture: Architecture, role: RoleSpec, blocks: Collection[str]
) -> Iterator[TensorPlan]:
    kept = architecture.kept_in_fp32
    layers = {} if role.lora is None else adapted_layers(architecture, role.lora)
    for plain, shape in architecture.parameters.items():
        layer, _, end = plain.rpartition(".")
        name = f"{layer}.base_layer.{end}" if layer in layers else plain
        yield TensorPlan(
            name=name,
            shape=shape,
            dtype=stored_dtype(name, role, kept),
            block=_block_of(plain, blocks),
            trained=role.trainable and role.lora is None,
        )
    for layer, (inputs, outputs) in layers.items():
        assert role.lora is not None
        shapes = (role.lora.rank, inputs), (outputs, role.lora.rank)
        for name, shape in zip(names_of(layer), shapes, strict=True):
            yield TensorPlan(
                name=name,
                shape=shape,
                dtype=stored_dtype(name, role, kept),
                block=_block_of(layer, blocks),
                trained=role.trainable,
                adapter=True,
            )


def _known_lists(architecture: Architecture, lists: Collection[str]) -> Collection[str]:
    """Give ``lists`` back, or raise ``WeightsError`` where the model has no such module list."""
    known = architecture.module_lists
    if unknown := sorted(set(lists) - known.keys()):
        raise WeightsError(
            f"fsdp.blocks: there is no module list {', '.join(unknown)} in this model, so nothing "
            f"would be gathered by it. Its longest is {max(known, key=lambda n: known[n])!r}"
        )
    return lists


def _block_of(name: str, blocks: Collection[str]) -> str | None:
    """Find the innermost of ``blocks`` that the parameter or layer ``name`` lies in."""
    parts = name.split(".")
    ends = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
    return next((end for end in ends if end in blocks), None)
