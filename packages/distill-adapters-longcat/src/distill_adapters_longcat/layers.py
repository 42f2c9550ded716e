"""Layers of the LongCat-Video transformer (Meituan 2025, arXiv 2510.22200, section 3.1).

Names of parameters and the order of operations are those of meituan-longcat/LongCat-Video at commit
6b3f4b8, ``longcat_video/modules/`` (``blocks.py``, ``attention.py``, ``rope_3d.py``), so that its
weights load as they are. Attention is torch's own.

Letters: B batch, N tokens, D width, H heads, E width of a head, L tokens of the text.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
_ROPE_BASE = 10_000.0


class KeysAndValues(NamedTuple):
    """What later tokens attend to: rotated keys and values, each [B, H, N, E]."""

    keys: Tensor
    values: Tensor


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each pair of channels, each [N, E / 2], fp32."""

    cos: Tensor
    sin: Tensor


def make_rotation(
    size: tuple[int, int, int], width: int, device: torch.device, *, first_frame: int = 0
) -> Rotation:
    """Compute the rotary embedding of tokens on a grid (RoFormer, Su et al. 2021, eq. 34, by axis).

    Height and width have ``2 (E // 6)`` channels each and time the rest; the token at (t, h, w) is
    turned by ``position / 10000^(2 i / channels)`` in pair i of each axis.

    Args:
        size: T, H and W in tokens, the last running fastest.
        width: E, of a head.
        first_frame: position of the first frame.
    """
    side = 2 * (width // 6)
    starts, channels = (first_frame, 0, 0), (width - 2 * side, side, side)
    angles = []
    for axis, (start, count, dim) in enumerate(zip(starts, size, channels, strict=True)):
        steps = torch.arange(0, dim, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / _ROPE_BASE ** (steps / dim)
        positions = torch.arange(start, start + count, dtype=torch.float32, device=device)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = count
        angles.append(torch.outer(positions, frequencies).view(shape).expand(*size, -1))
    by_token = torch.cat(angles, dim=-1).flatten(0, 2)
    return Rotation(by_token.cos(), by_token.sin())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn neighbouring pairs of channels of ``x`` [B, H, N, E] in fp32; like ``x``."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).type_as(x)


class Fp32Linear(nn.Linear):
    """Linear layer that computes in fp32, whatever its weights are stored in, and gives fp32."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


class Fp32LayerNorm(nn.LayerNorm):
    """Layer norm in fp32, of a weight and bias in any type; its output is like its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension."""
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).type_as(
            input
        )


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps)`` in fp32, rounded to the type of x, times the weight.

    Args:
        width: of the last dimension.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        return normed.type_as(x) * self.weight.type_as(x)


class SwiGLU(nn.Module):
    """``w2(silu(w1 x) * w3 x)`` (Shazeer 2020), whose inner width is 2/3 of ``hidden``, rounded up
    to a multiple of 256.

    Args:
        width: of a token.
        hidden: what a plain MLP would have.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        inner = -(-(2 * hidden // 3) // 256) * 256
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, D] to [B, N, D]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SelfAttention(nn.Module):
    """Attention over the clip, with RMS-normed queries and keys and a 3-D rotary embedding."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, rotation: Rotation, given: int = 0, past: KeysAndValues | None = None
    ) -> tuple[Tensor, KeysAndValues]:
        """Attend within ``x`` [B, N, D]; also return its own keys and values.

        Args:
            rotation: of the N tokens.
            given: so many tokens at the start attend to each other alone, the others to all
                (block attention, arXiv 2510.22200, eqs. 1 and 2).
            past: of tokens before ``x``, which all of it attends to as well.
        """
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        own = KeysAndValues(k, v)
        if past is not None:
            k, v = torch.cat([past.keys, k], dim=2), torch.cat([past.values, v], dim=2)
        if given:
            first = (q[:, :, :given], k[:, :, :given], v[:, :, :given])
            parts = [F.scaled_dot_product_attention(*first)]
            parts.append(F.scaled_dot_product_attention(q[:, :, given:], k, v))
            attended = torch.cat(parts, dim=2)
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2)), own


class CrossAttention(nn.Module):
    """Attention of the clip's tokens to the text, with RMS-normed queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from ``x`` [B, N, D] to ``text`` [B, L, D].

        Args:
            mask: of booleans [B, 1, 1, L], True at tokens that are attended to; None: all are.
        """
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        k, v = kv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        attended = F.scaled_dot_product_attention(q, k, v, mask)
        return self.proj(attended.transpose(1, 2).flatten(2))
