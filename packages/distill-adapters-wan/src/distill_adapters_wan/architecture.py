"""How the transformers of a role's path are built, from its folder or from published numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen
from distill_diffusers.folders import (
    folder_hint,
    folder_problem,
    is_hub_id,
    locate,
    read_json,
    transformer_names,
)
from distill_protocols import WeightsError

from distill_adapters_wan.published import PUBLISHED

TRAIN_STEPS = 1000.0
"""t at pure noise."""


@frozen(kw_only=True)
class Calling:
    """How a pipeline's index says that its transformers are called.

    Attributes:
        boundary_ratio: at ``t >= 1000 boundary_ratio`` ``transformer`` is called, below it
            ``transformer_2``; None: there is one transformer.
        expand_timesteps: each token has a t of its own, and a first frame that is given has 0.
    """

    boundary_ratio: float | None = None
    expand_timesteps: bool = False


def architecture(path: str) -> tuple[Mapping[str, Mapping[str, Any]], Calling]:
    """Transformer configurations by module name, and how they are called.

    Raises:
        WeightsError: nothing says how the model is built.
    """
    folder = locate(path)
    if folder is not None and (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        names = transformer_names(folder)
        if "transformer" not in names:
            raise WeightsError(
                f"{folder / 'model_index.json'} names no transformer, and every Wan model has one. "
                "Download the folder again"
            )
        if all((folder / name / "config.json").is_file() for name in names):
            configs = {name: read_json(folder / name / "config.json") for name in names}
            return configs, Calling(
                boundary_ratio=index.get("boundary_ratio"),
                expand_timesteps=bool(index.get("expand_timesteps")),
            )
    if path in PUBLISHED:
        model = PUBLISHED[path]
        return model.transformers, Calling(
            boundary_ratio=model.boundary_ratio, expand_timesteps=model.expand_timesteps
        )
    raise WeightsError(
        folder_problem(path)
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
