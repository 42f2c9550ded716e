"""How the transformers of a role's path are built, from its folder or from published numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill_protocols import WeightsError

from distill_adapters_wan.folders import (
    folder_fault,
    folder_hint,
    is_hub_id,
    locate,
    read_json,
    transformer_names,
)
from distill_adapters_wan.published import PUBLISHED


def architecture(path: str) -> tuple[Mapping[str, Mapping[str, Any]], bool]:
    """Transformer configurations by module name, and whether timesteps are a token's own.

    Raises:
        WeightsError: nothing says how the model is built.
    """
    folder = locate(path)
    if folder is not None and (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        names = transformer_names(folder)
        if all((folder / name / "config.json").is_file() for name in names):
            configs = {name: read_json(folder / name / "config.json") for name in names}
            return configs, bool(index.get("expand_timesteps"))
    if path in PUBLISHED:
        return PUBLISHED[path].transformers, PUBLISHED[path].expand_timesteps
    raise WeightsError(
        folder_fault(path)
        or (unknown_hub_id(path) if is_hub_id(path) else f"{path} has no transformer/config.json")
    )


def unknown_hub_id(path: str) -> str:
    """What to say of a hub id that is neither in the local cache nor published."""
    diffusers_id = f"{path}-Diffusers"
    if diffusers_id in PUBLISHED:
        return f"{path} holds Wan's original format; did you mean {diffusers_id}?"
    return (
        f"{path} is not in the local Hugging Face cache, and its architecture is not among those "
        f"that ship with this package ({', '.join(PUBLISHED)}), so nothing can be planned. "
        f"Download it first: hf download {path}{folder_hint(path)}"
    )
