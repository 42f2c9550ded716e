"""Positions of tokens in seconds and pixels, which LTX's rotary embedding reads.

The transformer divides them by 20 seconds and 2,048 pixels. Given as ``video_coords`` they are
the same to the last bit as what it computes itself from ``rope_interpolation_scale``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill_adapters_ltx.published import STRIDE_HW, STRIDE_T


def token_positions(
    size: tuple[int, int, int], frame_rate: float, *, causal: bool, device: torch.device
) -> Tensor:
    """Compute time (s), height and width (pixels) of each token, as ``video_coords`` expects them.

    The first latent frame holds one frame, every other holds eight. ``LTXPipeline`` counts eight
    for the first as well, so that latent frame i is at frame 8 i. ``LTXConditionPipeline`` puts it
    at frame max(0, 8 i - 7). Lightricks' code calls this ``causal_temporal_positioning`` and reads
    from the model's configuration whether to do so.

    Args:
        size: T, H and W of the latents.
        frame_rate: frames a second.
        causal: count frames as ``LTXConditionPipeline`` does.

    Returns:
        [1, 3, T H W] in fp32; tokens in the order of T, H, W.
    """
    frames, height, width = (torch.arange(n, dtype=torch.float32, device=device) for n in size)
    if causal:
        seconds = (frames * STRIDE_T + (1 - STRIDE_T)).clamp(min=0) * (1 / frame_rate)
    else:
        seconds = frames * (STRIDE_T / frame_rate)
    grid = torch.meshgrid(seconds, height * STRIDE_HW, width * STRIDE_HW, indexing="ij")
    return torch.stack(grid).flatten(1)[None]
