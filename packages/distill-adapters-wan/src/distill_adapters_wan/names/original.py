"""The names of the original Wan code, which ComfyUI reads, and diffusers' names for the same.

From ``wan/modules/model.py`` of Wan-Video/Wan2.1 and Wan2.2 and from diffusers'
``scripts/convert_wan_to_diffusers.py``. Only names differ: every tensor has the same shape and the
same numbers in both. ``norm2`` and ``norm3`` of a block mean each other: what is normed before the
cross-attention is ``norm3`` in the original and ``norm2`` in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from distill_protocols import WeightsError

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")

_IN_A_BLOCK: Mapping[str, str] = {
    "scale_shift_table": "modulation",
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",
    "norm3": "norm2",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
"""diffusers -> original; the image-to-video model of Wan 2.1 alone has the ``add`` ones."""

_OUTSIDE: Mapping[str, str] = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
}

_PARAMETERS = {
    "scale_shift_table",
    "modulation",
    "head.modulation",
    "condition_embedder.image_embedder.pos_embed",
    "img_emb.emb_pos",
}
"""Those of the names above that are parameters; the others are modules with weight and bias."""


def to_original(name: str) -> str:
    """Return the original code's name of diffusers' ``name``.

    Raises:
        WeightsError: no such parameter in a Wan transformer.
    """
    return _translated(name, _IN_A_BLOCK, _OUTSIDE, "diffusers' WanTransformer3DModel")


def to_diffusers(name: str) -> str:
    """diffusers' name of the original code's ``name``.

    Raises:
        WeightsError: no such parameter in the original model.
    """
    return _translated(name, _flipped(_IN_A_BLOCK), _flipped(_OUTSIDE), "the original WanModel")


def _translated(name: str, block: Mapping[str, str], outside: Mapping[str, str], of: str) -> str:
    inner = _BLOCK.fullmatch(name)
    prefix, rest = (f"blocks.{inner[1]}.", inner[2]) if inner else ("", name)
    table = block if inner else outside
    module, _, kind = rest.rpartition(".")
    if rest in _PARAMETERS and rest in table:
        return prefix + table[rest]
    if module not in table or module in _PARAMETERS or kind not in ("weight", "bias"):
        raise WeightsError(
            f"{name} is no parameter of {of}, so it has no name in the other format; the weights "
            "belong to another model"
        )
    return f"{prefix}{table[module]}.{kind}"


def _flipped(table: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in table.items()}
