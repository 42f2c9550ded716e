"""What a model class makes of a configuration: blocks, layers and sizes, from the meta device."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen
from distill_protocols import WeightsError
from torch import nn

from distill_diffusers.building import check_buffers, check_types, limited_building
from distill_diffusers.kinds import TARGET_GATE, ModelKind, class_name, load_class
from distill_diffusers.model_configs import read_integer

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin


@frozen(kw_only=True)
class Architecture:
    """A transformer without weights. Names are dotted, as in ``named_modules``.

    Attributes:
        class_name: of the transformer.
        config: the full configuration: what was given, and the class's defaults.
        parameters: shapes of the parameters, in the module's order.
        buffers: elements of all buffers.
        buffer_bytes: their bytes.
        module_lists: all module lists with their lengths.
        block_lists: those of them that hold the repeated blocks of the transformer.
        linear_layers: (in, out) of every linear layer, in the module's order.
        lora_layers: names of the linear layers that get an adapter by default.
        kept_in_fp32: parts of parameters' names that diffusers keeps in fp32 when the rest has 16
            bits (see ``is_kept_in_fp32``).
        width: channels of a token between two blocks.
    """

    class_name: str
    config: Mapping[str, object]
    parameters: Mapping[str, tuple[int, ...]]
    buffers: int
    buffer_bytes: int
    module_lists: Mapping[str, int]
    block_lists: tuple[str, ...]
    linear_layers: Mapping[str, tuple[int, int]]
    lora_layers: tuple[str, ...]
    kept_in_fp32: frozenset[str]
    width: int

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of all repeated blocks, in the order in which they are called."""
        return self.entries(*self.block_lists)

    def entries(self, *lists: str) -> tuple[str, ...]:
        """Return names of the entries of module lists."""
        return tuple(f"{name}.{i}" for name in lists for i in range(self.module_lists[name]))


def inspect_model(kind: ModelKind, config: Mapping[str, object]) -> Architecture:
    """Build the transformer of ``config`` on the meta device and read off what it is made of.

    The same class and configuration are built once in a process.

    Raises:
        WeightsError: the configuration builds no such transformer, or no repeated blocks are
            found in it.
    """
    written = json.dumps(dict(config), sort_keys=True)
    return _inspect(
        kind.transformer,
        (kind.time_embedder, kind.target_embedder),
        kind.block_lists,
        kind.lora_targets,
        kind.width,
        written,
    )


def transformer_class(kind: ModelKind) -> type[ModelMixin]:
    """Return the class of the trained module."""
    return load_class(kind.transformer)


def build_on_meta(kind: ModelKind, config: Mapping[str, object]) -> ModelMixin:
    """Build the transformer of ``config`` with parameters and buffers on the meta device.

    Raises:
        WeightsError: it builds none.
    """
    return _on_meta(kind.transformer, (kind.time_embedder, kind.target_embedder), config)


def kept_in_fp32(kind: ModelKind) -> frozenset[str]:
    """Parts of parameters' names that diffusers keeps in fp32 when the rest has 16 bits."""
    return frozenset(transformer_class(kind)._keep_in_fp32_modules or ())


def is_kept_in_fp32(name: str, parts: frozenset[str]) -> bool:
    """Return whether a parameter stays in fp32 when the rest has 16 bits, by diffusers' own rule.

    Of Wan these are time embedding, block norms and scale/shift tables; 16 bits harm them.
    """
    return not parts.isdisjoint(name.split("."))


def find_block_lists(module: ModelMixin) -> tuple[str, ...]:
    """Return names of the module lists that hold the transformer's repeated blocks.

    They are those right below the model whose entries are of one class; where the class states
    which of its parts repeat (``_repeated_blocks``), of one of these.

    Raises:
        WeightsError: there are none.
    """
    repeated = set(module._repeated_blocks or ())
    found = tuple(
        name
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList)
        and len({type(entry) for entry in child}) == 1
        and (not repeated or type(child[0]).__name__ in repeated)
    )
    if not found:
        raise WeightsError(
            f"no list of repeated blocks is found in {type(module).__name__}, so nothing of it "
            "could be sharded, compiled or read one at a time. Name its lists in "
            "ModelKind.block_lists"
        )
    return found


def has_suffix(name: str, suffix: str) -> bool:
    """Compare whole parts of the dotted name, as peft does."""
    return name == suffix or name.endswith(f".{suffix}")


def block_problem(index: int, blocks: int) -> str | None:
    """Say why ``index`` is no block of a transformer of ``blocks``; None where it is one."""
    if 0 <= index < blocks:
        return None
    return f"block {index} must be within 0 .. {blocks - 1}, as the model has {blocks} blocks"


def patch_size(config: Mapping[str, object]) -> tuple[int, int, int]:
    """(T, H, W) in latent cells that make one token, from a full configuration.

    diffusers writes either all three, or one for height and width beside ``patch_size_t``.
    """
    size = config["patch_size"]
    match size:
        case int():
            return read_integer(config, "patch_size_t", 1), size, size
        case [int(frames), int(height), int(width)]:
            return frames, height, width
    raise WeightsError(
        f"the configuration's patch_size {size!r} must be a number, or three: time, height, width"
    )


@lru_cache(maxsize=32)
def _inspect(
    transformer: str,
    embedders: tuple[str, str],
    block_lists: tuple[str, ...],
    lora_targets: tuple[str, ...],
    width: str,
    config: str,
) -> Architecture:
    module = _on_meta(transformer, embedders, json.loads(config))
    block_lists = block_lists or find_block_lists(module)
    lists = {n: len(m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList)}
    linear = {
        name: (layer.in_features, layer.out_features)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    within = [name for name in linear if name.startswith(tuple(f"{n}." for n in block_lists))]
    first = f"{block_lists[0]}.0."
    return Architecture(
        class_name=class_name(transformer),
        config=dict(module.config),
        parameters={name: tuple(p.shape) for name, p in module.named_parameters()},
        buffers=sum(b.numel() for b in module.buffers()),
        buffer_bytes=sum(b.nbytes for b in module.buffers()),
        module_lists=lists,
        block_lists=block_lists,
        linear_layers=linear,
        lora_layers=tuple(
            name
            for name in (linear if lora_targets else within)
            if not lora_targets or any(has_suffix(name, target) for target in lora_targets)
        ),
        kept_in_fp32=frozenset(module._keep_in_fp32_modules or ()),
        # Most transformer blocks end with the projection of their MLP to the residual stream.
        width=read_integer(module.config, width)
        if width
        else next(size for name, size in reversed(linear.items()) if name.startswith(first))[1],
    )


def add_target_embedder(
    module: nn.Module, time_embedder: str, target_embedder: str, gate: object
) -> None:
    """Put a second time embedder beside the first, built alike, and its gate into the
    configuration (``TARGET_GATE``): the transformer is a flow map then (``roles.target_time``).

    Args:
        time_embedder, target_embedder: see ``ModelKind``.

    Raises:
        WeightsError: it is not stated where a second one would be.
    """
    if not target_embedder:
        raise WeightsError(
            f"{type(module).__name__} cannot be a flow map: where a second time embedder is, is "
            "not stated (ModelKind.target_embedder). Use a family that states it"
        )
    parent, _, name = target_embedder.rpartition(".")
    embedder = copy.deepcopy(module.get_submodule(time_embedder))
    module.get_submodule(parent).add_module(name, embedder)
    configured: Any = module
    configured.register_to_config(**{TARGET_GATE: gate})


def _on_meta(
    transformer: str, embedders: tuple[str, str], config: Mapping[str, object]
) -> ModelMixin:
    model_class: type[ModelMixin] = load_class(transformer)
    gate = config.get(TARGET_GATE)
    config = {key: value for key, value in config.items() if key != TARGET_GATE}
    what = f"the configuration builds no {class_name(transformer)}"
    with limited_building(what, "it belongs to another model, or is damaged"):
        check_types(model_class, config)
        with torch.device("meta"):
            # From ConfigMixin, which every model class of diffusers has beside ModelMixin.
            module = model_class.from_config(dict(config))  # type: ignore[attr-defined]
            if gate is not None:
                add_target_embedder(module, *embedders, gate)
        check_buffers(module)
        return module
