"""The order of samples, and whose condition is dropped: pure functions of seed and epoch.

The epochs follow each other without a seam, as one endless stream of positions 0, 1, 2, ...;
position p is place ``p % N`` of epoch ``p // N``. Nothing depends on how the stream is cut into
batches and ranks, so a run that resumes, or goes on with another batch size or number of ranks,
sees the same samples in the same order.
"""

from __future__ import annotations

import torch
from distill_protocols import derive_seed
from torch import Tensor


def epoch_order(seed: int, epoch: int, samples: int, *, shuffle: bool) -> Tensor:
    """Order the samples of one epoch (counted from 0): int64 [samples], each number once."""
    if not shuffle:
        return torch.arange(samples)
    generator = torch.Generator().manual_seed(derive_seed(seed, "data.order", epoch))
    return torch.randperm(samples, generator=generator)


def rank_positions(first: int, batch_size: int, rank: int, world_size: int) -> range:
    """Return the stream positions of one rank in the global batch that begins at ``first``: every
    ``world_size``-th, so that the global batch is the same set for any number of ranks."""
    return range(first + rank, first + batch_size * world_size, world_size)


def drops_condition(seed: int, epoch: int, sample: int, rate: float) -> bool:
    """Tell whether ``sample`` loses its caption in ``epoch``: true with probability ``rate``."""
    return derive_seed(seed, "data.dropout", epoch, sample) < rate * 2**63
