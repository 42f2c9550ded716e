"""Names of weights in Lightricks' own code, which ComfyUI reads, and diffusers' names for the same.

From ``convert_ltx_transformer_checkpoint_to_diffusers`` of diffusers. Tensors are the same in both,
and so are the names of linear layers within blocks: a LoRA of these differs by its prefix alone.
"""

from __future__ import annotations

_SEGMENTS = (
    ("proj_in", "patchify_proj"),
    ("time_embed", "adaln_single"),
    ("norm_q", "q_norm"),
    ("norm_k", "k_norm"),
)
"""Parts between the dots, of diffusers and of the original code."""


def to_original(name: str) -> str:
    """Translate diffusers' name of a parameter to the original code's."""
    return ".".join(dict(_SEGMENTS).get(part, part) for part in name.split("."))


def to_diffusers(name: str) -> str:
    """Translate the original code's name of a parameter to diffusers'."""
    ours = {original: segment for segment, original in _SEGMENTS}
    return ".".join(ours.get(part, part) for part in name.split("."))
