"""Inputs of the recorded outputs of the original code, by seed alone."""

from __future__ import annotations

import torch
from longcat_pipelines import LATENT_CHANNELS, TEXT_WIDTH
from torch import Tensor

SIZE = (3, 4, 6)
LENGTH = 7


def normal(*shape: int, seed: int) -> Tensor:
    """Draw fp32 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(rows: int = 2) -> Tensor:
    """Noise [rows, C, 3, 4, 6]."""
    return normal(rows, LATENT_CHANNELS, *SIZE, seed=1)


def given(count: int, rows: int = 2) -> Tensor:
    """Clean latents of the first ``count`` frames."""
    return normal(rows, LATENT_CHANNELS, count, *SIZE[1:], seed=2)


def text(rows: int = 2) -> tuple[Tensor, Tensor]:
    """Embeddings [rows, L, D] of 5 and 2 tokens, noise behind them, and their mask."""
    mask = (torch.arange(LENGTH) < torch.tensor([[5], [2]])).float()
    return normal(2, LENGTH, TEXT_WIDTH, seed=3)[:rows], mask[:rows]


def negative(rows: int = 2) -> tuple[Tensor, Tensor]:
    """The negative prompt's, of 3 tokens."""
    mask = (torch.arange(LENGTH) < 3).float()[None]
    return normal(1, LENGTH, TEXT_WIDTH, seed=4).expand(rows, -1, -1), mask.expand(rows, -1)
