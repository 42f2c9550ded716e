"""Diffusers modules from their folders, strictly: every key, every shape, or an error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from distill_protocols import DTYPES, ModelBundle, RoleHandle, RoleSpec, WeightsError
from safetensors import SafetensorError, safe_open
from torch import nn

from distill_adapters_wan.folders import (
    DIFFUSERS_STEM,
    fetch,
    read_json,
    weight_files,
)
from distill_adapters_wan.shape import unsupported

Module = TypeVar("Module", bound=nn.Module)


def load_bundle(roles: Sequence[RoleSpec], *, device: torch.device) -> ModelBundle:
    """All roles with their weights; roles of one path share a file, never a tensor."""
    return ModelBundle({role.name: load_role(role, device=device) for role in roles})


def load_role(role: RoleSpec, *, device: torch.device) -> RoleHandle:
    """One role: fp32 weights where it is trained, its own precision (and eval mode) where frozen.

    Within a 16-bit role, what diffusers keeps in fp32 stays so (time embedding, norms,
    scale_shift_table, buffers), and the adapter calls it without autocast: a frozen teacher then
    gives, bit for bit, what ``from_pretrained(torch_dtype=...)`` gives. With all parameters in
    bf16 it was off from that by 0.6 to 0.8 % rms (max 0.06 of 2.2 rms on the tiny taught Wan),
    as much as bf16 itself is off from fp32 (0.7 to 1.1 %). FSDP2 refuses modules of mixed types:
    sharding a frozen 16-bit role needs its weights in fp32 under a mixed-precision policy.

    Raises:
        WeightsError: a file or key is missing, unexpected or damaged, or the model is a variant
            that this version does not train.
    """
    folder = fetch(role.path, ("transformer",))
    refuse_variant(role.path, folder)
    dtype = torch.float32 if role.trainable else DTYPES[role.precision]
    transformer = load_module(
        WanTransformer3DModel, folder / "transformer", dtype=dtype, device=device
    )
    return RoleHandle(
        name=role.name,
        modules={"transformer": transformer},
        trainable=role.trainable,
        precision=role.precision,
        fsdp_policy=role.fsdp,
    )


def refuse_variant(path: str, folder: Path) -> None:
    """Raise ``WeightsError`` for a Wan variant that the adapter would call wrongly."""
    index = read_json(folder / "model_index.json")
    names = [n for n in ("transformer", "transformer_2") if (index.get(n) or [None])[0]]
    configs = {n: read_json(folder / n / "config.json") for n in names}
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
    files = weight_files(folder, DIFFUSERS_STEM)
    _check_keys(folder, module.state_dict(), _shapes(files))
    wide = set(module_class._keep_in_fp32_modules or ())  # type: ignore[attr-defined]
    weights = {}
    for file in files:
        with _opened(file) as stream:
            for key in stream.keys():  # noqa: SIM118 - safe_open is no mapping
                # Copied: what safe_open returns may still be a view of the mapped file.
                kept = torch.float32 if wide & set(key.split(".")) else dtype
                weights[key] = stream.get_tensor(key).to(device=device, dtype=kept, copy=True)
    module.load_state_dict(weights, strict=True, assign=True)
    return module.to(device).eval()


def build(module_class: type[Module], folder: Path) -> Module:
    """The module from ``config.json``: parameters on meta, buffers real.

    Buffers must not go through meta: Wan's rotary tables are in no state dict, so nothing would
    fill them again, and the loaded weights would still compare equal.
    """
    config = read_json(folder / "config.json")
    try:
        with init_empty_weights(include_buffers=False):
            return module_class.from_config(config)  # type: ignore[attr-defined]
    except (TypeError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{folder / 'config.json'} builds no {module_class.__name__}: {error}. It belongs to "
            "another model, or is damaged"
        ) from error


def _shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with _opened(file) as stream:
            for key in stream.keys():  # noqa: SIM118
                shapes[key] = tuple(stream.get_slice(key).get_shape())
    return shapes


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file} cannot be read ({error}): missing, cut short, or a Git LFS pointer. Download "
            "it again"
        ) from error


def _check_keys(
    folder: Path, expected: Mapping[str, torch.Tensor], found: Mapping[str, tuple[int, ...]]
) -> None:
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
        raise WeightsError(
            f"{folder}: the weights do not match config.json; {'; '.join(said)}. All keys must "
            "match, because a module with leftover random weights trains and looks healthy. Use "
            "weights and config.json of one model"
        )


def _some(keys: Sequence[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
