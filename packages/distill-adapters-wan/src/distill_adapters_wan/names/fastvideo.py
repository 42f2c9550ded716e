"""FastVideo's names of Wan's weights and Diffusers', both ways, by one table. No torch here.

FastVideo has no module around self-attention (``blocks.0.to_q``), calls an MLP's layers ``fc_in``
and ``fc_out``, and keeps some norms and convolutions one level deeper. Source: its
``fastvideo/models/dits/wanvideo.py`` and ``fastvideo/configs/models/dits/wanvideo.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from distill_protocols import WeightsError

from distill_adapters_wan.names import original as original_names

_MLP = {"linear_1": "fc_in", "linear_2": "fc_out"}
_ATTENTION = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
_IMAGE_ATTENTION = ("add_k_proj", "add_v_proj", "norm_added_k")

# Diffusers -> FastVideo; each stands for its .weight and its .bias.
_TOP: Mapping[str, str] = {
    "patch_embedding": "patch_embedding.proj",
    "proj_out": "proj_out",
    "condition_embedder.time_proj": "condition_embedder.time_modulation.linear",
    **{
        f"condition_embedder.time_embedder.{ours}": f"condition_embedder.time_embedder.mlp.{theirs}"
        for ours, theirs in _MLP.items()
    },
    **{
        f"condition_embedder.text_embedder.{ours}": f"condition_embedder.text_embedder.{theirs}"
        for ours, theirs in _MLP.items()
    },
    **{
        f"condition_embedder.image_embedder.{ours}": f"condition_embedder.image_embedder.{theirs}"
        for ours, theirs in {
            "norm1": "norm1",
            "ff.net.0.proj": "ff.fc_in",
            "ff.net.2": "ff.fc_out",
            "norm2": "norm2",
        }.items()
    },
}
_BLOCK: Mapping[str, str] = {
    **{f"attn1.{name}": name for name in _ATTENTION},
    "attn1.to_out.0": "to_out",
    **{f"attn2.{name}": f"attn2.{name}" for name in (*_ATTENTION, *_IMAGE_ATTENTION)},
    "attn2.to_out.0": "attn2.to_out",
    "norm2": "self_attn_residual_norm.norm",
    "ffn.net.0.proj": "ffn.fc_in",
    "ffn.net.2": "ffn.fc_out",
}
_TABLE = "scale_shift_table"
"""Same name in both, at the top and in each block, and no module's weight."""
_PAIR_POSITIONS = "condition_embedder.image_embedder.pos_embed"
"""Same name in both, and no module's weight; of models of first and last frames."""

_NAME = re.compile(r"(blocks\.\d+\.)?(.+)\.(weight|bias)")
_TABLE_NAME = re.compile(rf"(blocks\.\d+\.)?{_TABLE}")
_UNUSED = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")
_PREFIX = re.compile(r"model\.diffusion_model\.|diffusion_model\.|model\.")
"""Self-Forcing's, and those of ComfyUI's files."""
_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")


def to_diffusers(name: str) -> str | None:
    """FastVideo's name -> Diffusers'; None for a name that is not FastVideo's."""
    return _renamed(name, _inverse(_TOP), _inverse(_BLOCK))


def from_diffusers(name: str) -> str | None:
    """Diffusers' name -> FastVideo's; None for a name that is not Diffusers'."""
    return _renamed(name, _TOP, _BLOCK)


def is_diffusers(name: str) -> bool:
    """Return whether a weight of ``WanTransformer3DModel`` can be called so."""
    return from_diffusers(name) is not None


def migrated(name: str) -> str | None:
    """Diffusers' name of a weight that FastVideo or Self-Forcing saved; None for an unknown one.

    FastVideo trains under its own names, exports under Diffusers', and Self-Forcing has those of
    the original Wan behind ``model.``; where two of them have a name in common, it means the same.
    What wrappers (FSDP, activation checkpointing, compile) put in between is taken out.
    """
    plain = _plain(name)
    if is_diffusers(plain):
        return plain
    known = to_diffusers(plain)
    if known is not None:
        return known
    try:
        return original_names.to_diffusers(plain)
    except WeightsError:
        return None


def unused(name: str) -> bool:
    """Return whether a weight is stored for no purpose: FastVideo's image-to-video blocks normalise
    no added query (diffusers ignores it on loading too), but keep a weight for it."""
    return _UNUSED.fullmatch(_plain(name)) is not None


def missing(names: Iterable[str]) -> Sequence[str]:
    """List the names that a complete ``WanTransformer3DModel`` has beside ``names`` (Diffusers'):
    what every Wan has, the rest of an image branch, and equal blocks without a gap."""
    have = set(names)
    image = any(".image_embedder." in name or ".add_k_proj." in name for name in have)
    blocks = 1 + max((int(name.split(".")[1]) for name in have if _in_block(name)), default=0)
    wanted = {f"{stem}.{leaf}" for stem in _TOP for leaf in _leaves(stem)} | {_TABLE}
    for index in range(blocks):
        wanted |= {f"blocks.{index}.{s}.{leaf}" for s in _BLOCK for leaf in _leaves(s)}
        wanted.add(f"blocks.{index}.{_TABLE}")
    if not image:
        wanted = {name for name in wanted if not _of_image(name)}
    return sorted(wanted - have)


def _plain(name: str) -> str:
    plain = _WRAPPERS.sub("", name)
    prefix = _PREFIX.match(plain)
    return plain if prefix is None else plain[prefix.end() :]


def _leaves(stem: str) -> tuple[str, ...]:
    # Queries and keys are normalised by RMS, without a bias.
    return ("weight",) if re.search(r"norm_(q|k|added_k)$", stem) else ("weight", "bias")


def _of_image(name: str) -> bool:
    return ".image_embedder." in name or any(f".{part}." in name for part in _IMAGE_ATTENTION)


def _in_block(name: str) -> bool:
    return re.match(r"blocks\.\d+\.", name) is not None


def _inverse(table: Mapping[str, str]) -> Mapping[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def _renamed(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str | None:
    if _TABLE_NAME.fullmatch(name) or name == _PAIR_POSITIONS:
        return name
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    prefix, stem, leaf = match[1] or "", match[2], match[3]
    image = (block if prefix else top).get(stem)
    return None if image is None else f"{prefix}{image}.{leaf}"
