"""Which features a discriminator can have. No torch: run files are checked against it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distill_protocols import DiscriminatorSpec, Problem

from distill_diffusers.roles.lora import DEFAULTS


def head_problems(transformer: Mapping[str, Any], heads: DiscriminatorSpec) -> Iterator[Problem]:
    """Pairs of a key of ``heads`` and a message."""
    there = {**DEFAULTS, **transformer}["num_layers"]
    for index in heads.blocks:
        if problem := block_problem(index, there):
            way_out = "The one in the middle, at three quarters and the last are customary"
            yield Problem("blocks", f"{problem}, counted from 0. {way_out}")


def block_problem(index: int, blocks: int) -> str | None:
    """Why ``index`` is no block of a transformer of ``blocks``."""
    if 0 <= index < blocks:
        return None
    return f"block {index} must be within 0 .. {blocks - 1}, as the model has {blocks} blocks"
