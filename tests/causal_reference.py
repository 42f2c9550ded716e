"""Block-causal attention again, written another way: frame by frame, from lists, in fp64.

No line of the code under test is used: chunks, windows and positions come from playing the cache
with a list of frames, rotation from complex numbers, attention from a softmax.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Seen = list[tuple[list[int], list[int], int]]
"""For each query frame: key frames, their positions, its own position."""


def chunk_lists(frames: int, *, size: int, alone: bool) -> list[list[int]]:
    """[[0], [1, 2, 3], ...]"""
    chunks, capacity = [], 1 if alone else size
    for frame in range(frames):
        if not chunks or len(chunks[-1]) == capacity:
            capacity = 1 if alone and not chunks else size
            chunks.append([])
        chunks[-1].append(frame)
    return chunks


def evict(past: list[int], *, size: int, window: int | None, sink: int) -> list[int]:
    """Evict one frame after another, the oldest that is no sink first."""
    past = list(past)
    while window is not None and len(past) > window - size:
        past.pop(sink)
    return past


def seen_in_clip(
    frames: int, *, size, alone=False, window=None, sink=0, positions="moving"
) -> Seen:
    seen, past = [], []
    for chunk in chunk_lists(frames, size=size, alone=alone):
        keys = past + chunk
        for frame in chunk:
            if positions == "kept":
                seen.append((keys, keys, frame))
            else:
                seen.append((keys, list(range(len(keys))), keys.index(frame)))
        past = evict(keys, size=size, window=window, sink=sink)
    return seen


def seen_beside_clean(frames: int, *, size, alone=False, **window) -> Seen:
    """[clean; noisy]: noisy frames count on from ``frames``."""
    clean = seen_in_clip(frames, size=size, alone=alone, **window)
    noisy = [
        (
            [k if k not in chunk else frames + k for k in clean[frame][0]],
            clean[frame][1],
            clean[frame][2],
        )
        for chunk in chunk_lists(frames, size=size, alone=alone)
        for frame in chunk
    ]
    return clean + noisy


class ReferenceProcessor:
    """Set on ``attn1`` of a stock transformer; the rotary tables that it is given are ignored.

    Keys and values of the first ``detached`` frames take no gradient.
    """

    def __init__(self, seen: Seen, grid: tuple[int, int], detached: int = 0) -> None:
        self.seen = seen
        self.grid = grid
        self.detached = detached

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ):
        tokens = self.grid[0] * self.grid[1]
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (
            x.double().unflatten(2, (attn.heads, -1)).transpose(1, 2).unflatten(2, (-1, tokens))
            for x in (q, k, attn.to_v(hidden_states))
        )  # [B, heads, frames, tokens, width]
        k, v = (
            torch.cat([x[:, :, : self.detached].detach(), x[:, :, self.detached :]], dim=2)
            for x in (k, v)
        )
        rows = []
        for frame, (keys, positions, own) in enumerate(self.seen):
            query = self.turned(q[:, :, frame], own)
            key = torch.cat(
                [self.turned(k[:, :, f], p) for f, p in zip(keys, positions, strict=True)], dim=2
            )
            value = torch.cat([v[:, :, f] for f in keys], dim=2)
            logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            rows.append(torch.softmax(logits, -1) @ value)
        out = torch.cat(rows, dim=2).transpose(1, 2).flatten(2).to(hidden_states)
        return attn.to_out[0](out)

    def turned(self, x: Tensor, frame: int) -> Tensor:
        """[B, heads, tokens of one frame, width] at temporal position ``frame``."""
        width, (height, breadth) = x.shape[-1], self.grid
        side = 2 * (width // 6)
        angles = torch.stack(
            [
                torch.cat(
                    [_angles(frame, width - 2 * side), _angles(row, side), _angles(column, side)]
                )
                for row in range(height)
                for column in range(breadth)
            ]
        )
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.view_as_real(turned).flatten(-2)


def _angles(position: int, width: int) -> Tensor:
    return position * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
