"""Decoded clips as the bytes that files hold."""

from __future__ import annotations

import torch
from torch import Tensor


def to_uint8(clips: Tensor) -> Tensor:
    """Convert [..., 3, T, H, W] in [0, 1] to [..., T, H, W, 3] uint8 on the CPU, contiguous.

    Values outside of [0, 1] are clamped.
    """
    # On the clips' own device: an eighth of a float32 clip's bytes goes to the CPU then.
    pixels = (clips.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.movedim(-4, -1).contiguous().cpu()
