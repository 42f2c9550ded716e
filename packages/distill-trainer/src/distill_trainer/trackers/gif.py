"""Clips as an animated GIF, in memory. Letters: B clips, F frames, H and W pixels."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

_MARGIN = 2


def clips_to_gif(clips: Tensor, fps: float) -> bytes:
    """Encode all clips side by side as one GIF that repeats without end.

    Args:
        clips: [B, 3, F, H, W] in [0, 1]; values outside are clamped.
        fps: frames per second; GIF rounds a frame's time to 10 ms.
    """
    frames = [Image.fromarray(frame.numpy()) for frame in side_by_side(clips)]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=max(10, round(1000 / fps)),
        loop=0,
    )
    return buffer.getvalue()


def side_by_side(clips: Tensor) -> Tensor:
    """Arrange clips [B, 3, F, H, W] as frames [F, H, B (W + 2), 3] uint8, with margins between."""
    b, c, f, h, w = clips.shape
    pixels = (clips.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    padded = torch.zeros(b, c, f, h, w + _MARGIN, dtype=torch.uint8)
    padded[..., :w] = pixels
    return padded.permute(2, 3, 0, 4, 1).reshape(f, h, b * (w + _MARGIN), c)
