"""Shapes of latents and conditions, from the configurations of a pipeline's parts. No torch here.

Letters: C channels, T latent frames (always 1), H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distill_family_sd3.config import SD3PipelineConfig

TEXT, POOLED = "text", "pooled"
"""Names of a condition's tensors [B, L, D] and [B, P]."""


def latent_shape(config: SD3PipelineConfig, vae: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Compute (C, T, H, W) of a picture."""
    stride = 2 ** (len(vae["block_out_channels"]) - 1)
    return vae["latent_channels"], 1, config.height // stride, config.width // stride


def condition_shapes(
    config: SD3PipelineConfig, transformer: Mapping[str, Any], *, clip_tokens: int
) -> dict[str, tuple[int, ...]]:
    """Compute the shapes of one condition: tokens of CLIP, then those of T5; and the pooled one."""
    tokens = clip_tokens + config.max_sequence_length
    return {
        TEXT: (tokens, transformer["joint_attention_dim"]),
        POOLED: (transformer["pooled_projection_dim"],),
    }


def size_problems(
    shape: tuple[int, int, int, int], transformer: Mapping[str, Any]
) -> Iterator[str]:
    """Yield why latents of ``shape`` do not fit the transformer."""
    channels, _, height, width = shape
    if channels != transformer["in_channels"]:
        yield (
            f"the VAE makes latents of {channels} channels and the transformer reads "
            f"{transformer['in_channels']}; take VAE and transformer of one model"
        )
    most = transformer["pos_embed_max_size"] * transformer["patch_size"]
    if max(height, width) > most:
        yield (
            f"latents of {height} x {width} are larger than {most} x {most}, which is how far the "
            "model's table of positions reaches; make the picture smaller"
        )
