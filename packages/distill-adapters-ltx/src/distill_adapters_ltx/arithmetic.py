"""What ``LTXPipeline`` computes around its models, bit for bit.

Letters: B batch, C channels, T latent frames, H and W latent height and width; L = T H W tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_adapters_ltx.published import STRIDE_HW, STRIDE_T


def pack(latents: Tensor) -> Tensor:
    """View latents [B, C, T, H, W] as tokens [B, L, C], one a cell, in the order of T, H, W."""
    return latents.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, size: tuple[int, int, int]) -> Tensor:
    """View tokens [B, L, C] as latents [B, C, T, H, W]; ``size`` is T, H and W."""
    return tokens.transpose(1, 2).unflatten(2, size)


def normalize(raw: Tensor, mean: Tensor, std: Tensor, scaling_factor: float = 1.0) -> Tensor:
    """Compute ``(raw - mean) scaling_factor / std``.

    Args:
        raw: [B, C, T, H, W] as the VAE makes them.
        mean: [C], as std a buffer of the VAE, and no entry of its configuration.
        std: [C].
        scaling_factor: of the VAE's configuration, 1 in all published models.
    """
    return (raw - _per_channel(mean, raw)) * scaling_factor / _per_channel(std, raw)


def denormalize(latents: Tensor, mean: Tensor, std: Tensor, scaling_factor: float = 1.0) -> Tensor:
    """Compute ``latents std / scaling_factor + mean``; see ``normalize``."""
    return latents * _per_channel(std, latents) / scaling_factor + _per_channel(mean, latents)


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).view(1, -1, 1, 1, 1)


def rescale_guidance(guided: Tensor, conditional: Tensor, factor: float) -> Tensor:
    """Pull the spread of ``guided`` back to that of ``conditional``, a sample at a time.

    ``factor guided std(conditional) / std(guided) + (1 - factor) guided`` (Lin et al. 2024, "Common
    Diffusion Noise Schedules and Sample Steps are Flawed", eqs. 15 and 16).

    Args:
        guided: u + w (c - u) [B, ...].
        conditional: c [B, ...].
        factor: phi, from 0 (nothing changes) to 1.
    """
    rest = list(range(1, guided.dim()))
    spread = conditional.std(dim=rest, keepdim=True) / guided.std(dim=rest, keepdim=True)
    return factor * (guided * spread) + (1 - factor) * guided


def token_positions(
    size: tuple[int, int, int], frame_rate: float, *, causal: bool = False, device: torch.device
) -> Tensor:
    """Compute time (s), height and width (pixels) of each token: ``video_coords`` [1, 3, L], fp32.

    The first latent frame holds one frame, every other eight. ``LTXPipeline`` counts eight for the
    first as well: latent frame i is at frame 8 i. ``LTXConditionPipeline`` puts it at max(0, 8 i -
    7), which Lightricks' code calls ``causal_temporal_positioning``.

    Args:
        size: T, H and W of the latents.
        frame_rate: frames a second.
        causal: count frames as ``LTXConditionPipeline`` does.
    """
    frames, height, width = (torch.arange(n, dtype=torch.float32, device=device) for n in size)
    if causal:
        seconds = (frames * STRIDE_T + (1 - STRIDE_T)).clamp(min=0) * (1 / frame_rate)
    else:
        seconds = frames * (STRIDE_T / frame_rate)
    grid = torch.meshgrid(seconds, height * STRIDE_HW, width * STRIDE_HW, indexing="ij")
    return torch.stack(grid).flatten(1)[None]
