"""Latents as a sequence of tokens, where a token is one latent cell.

Letters: B batch, D channels; T, H and W the size in cells; L = T H W tokens, W running fastest.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """View latents [B, D, T, H, W] as tokens [B, L, D]."""
    return latents.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """View tokens [B, L, D] as latents [B, D, T, H, W]; ``size`` is (T, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, list(size))
