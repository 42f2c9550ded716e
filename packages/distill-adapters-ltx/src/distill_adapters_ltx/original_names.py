"""The names of Lightricks' own code, which ComfyUI reads, and diffusers' names for the same.

From ``convert_ltx_transformer_checkpoint_to_diffusers`` of diffusers and
``diffusers_config_mapping.py`` of Lightricks/LTX-Video. Only names differ: every tensor has the
same shape and the same numbers in both. Names of linear layers within a block are alike, so a LoRA
of blocks differs by its prefix alone.
"""

from __future__ import annotations

from collections.abc import Mapping

_SEGMENTS: Mapping[str, str] = {
    "proj_in": "patchify_proj",
    "time_embed": "adaln_single",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}
"""Diffusers -> original, by the parts between the dots."""


def to_original(name: str) -> str:
    """Translate diffusers' name of a parameter to the original code's."""
    return _translate(name, _SEGMENTS)


def to_diffusers(name: str) -> str:
    """Translate the original code's name of a parameter to diffusers'."""
    return _translate(name, {original: ours for ours, original in _SEGMENTS.items()})


def _translate(name: str, table: Mapping[str, str]) -> str:
    return ".".join(table.get(part, part) for part in name.split("."))
