"""Diffusers modules from their folders, strictly: every key, every shape, or an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import init_empty_weights
from distill_protocols import WeightsError, WeightSource
from distill_runtime import ALONE
from torch import Tensor

from distill_diffusers.architecture import is_kept_in_fp32
from distill_diffusers.building import (
    check_buffers,
    check_types,
    limited_building,
    plain_tables,
)
from distill_diffusers.folders import not_trained_from
from distill_diffusers.lora import is_adapter
from distill_diffusers.model_configs import read_config
from distill_diffusers.weights.filling import fill, move_buffers
from distill_diffusers.weights.sources import module_weights

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

ModuleT = TypeVar("ModuleT", bound="ModelMixin")
ALL_OR_NOTHING = (
    "All keys must match, because a module with leftover random weights trains and looks healthy. "
    "Use weights and config.json of one model"
)


def load_module(
    module_class: type[ModuleT],
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> ModuleT:
    """Load a diffusers module, in eval mode.

    Args:
        dtype: of the parameters, but for those that its class keeps in fp32.

    Raises:
        WeightsError: naming the file, or every key that is missing, unexpected or of another shape.
    """
    module = build_module(module_class, folder)
    cast_parameters(module, dtype)
    source = module_weights(folder)
    targets = module.state_dict()
    check_keys(source, targets, ALL_OR_NOTHING)
    device = torch.device(device)
    state = fill(targets, lambda: source, ranks=ALONE, device_of=lambda target: device)
    module.load_state_dict(state, strict=True, assign=True)
    move_buffers(module, device)
    return module.eval()


def build_module(module_class: type[ModuleT], folder: Path) -> ModuleT:
    """Build the module of ``config.json``, with parameters on meta, and with real buffers and plain
    tables unless its state dict has all of them.

    Others must not go through meta: Wan's rotary tables are in no state dict, so nothing would fill
    them again, and the loaded weights would still compare equal; Qwen-Image's are no buffers. SD
    3's table of positions is in it, and to compute its 56 to 226 million numbers only to read them
    from the file takes seconds and a gigabyte. The global generator is left as it was: on their way
    to meta, Wan's scale_shift_tables are drawn from it.

    Raises:
        WeightsError: the configuration is missing or damaged, or of another class.
    """
    return build_from(module_class, read_config(folder / "config.json"), folder / "config.json")


def build_from(module_class: type[ModuleT], config: Mapping[str, object], where: object) -> ModuleT:
    """Build the module of a configuration that was read already, as ``build_module`` does.

    Args:
        where: where the configuration comes from, for messages.
    """
    what = f"{where} builds no {module_class.__name__}"
    with limited_building(what, "it belongs to another model, or is damaged"):
        check_types(module_class, config)
        with torch.device("meta"):
            # From ConfigMixin, which every model class of diffusers has beside ModelMixin.
            module = module_class.from_config(dict(config))  # type: ignore[attr-defined]
        check_buffers(module)
        buffers = {name for name, _ in module.named_buffers()}
        are_stored = bool(buffers) and buffers <= module.state_dict().keys()
        if are_stored and not any(plain_tables(module)):
            return module
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
            return module_class.from_config(dict(config))  # type: ignore[attr-defined]


def cast_parameters(module: ModelMixin, dtype: torch.dtype) -> None:
    """Turn parameters, on meta, to ``dtype``; adapters, and where 16 bits harm, to fp32."""
    kept = frozenset(module._keep_in_fp32_modules or ())
    for name, parameter in module.named_parameters():
        wide = is_adapter(name) or is_kept_in_fp32(name, kept)
        parameter.data = parameter.data.to(torch.float32 if wide else dtype)


def check_keys(source: WeightSource, expected: Mapping[str, Tensor], rule: str) -> None:
    """Raise ``WeightsError`` unless ``source`` has just the names and shapes of ``expected``.

    Weights of 8 bits are refused too: copied into wider ones they would train and look healthy.

    The message names what is missing, unexpected and of another shape, and ends with ``rule``.
    """
    infos = source.describe()
    for name, info in infos.items():
        if info.dtype.itemsize < 2:
            dtype = str(info.dtype).removeprefix("torch.")
            raise WeightsError(f"{source.where}: {name} {not_trained_from(dtype)}")
    shapes = {name: info.size for name, info in infos.items()}
    other_shapes = [
        f"{key} {list(shapes[key])} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in shapes and shapes[key] != tuple(value.shape)
    ]
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "of another shape": other_shapes,
    }
    listed = [f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in problems.items() if keys]
    if listed:
        raise WeightsError(f"{source.where}: the weights do not fit; {'; '.join(listed)}. {rule}")


def _first(keys: Sequence[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
