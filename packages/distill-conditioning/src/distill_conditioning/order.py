"""The order of samples: pure functions of the seed and of places in the stream of all samples.

**Within a bucket** the epochs follow each other without a seam, as one endless stream of positions
0, 1, 2, ...; position p is place ``p % N`` of epoch ``p // N``. **Between buckets** each group of
samples, those of an iteration, comes from one, so that all ranks have equal work. Nothing depends
on how a group is cut into batches and ranks, so a run that resumes, or goes on with another number
of ranks, sees the same samples in the same order; where there is one bucket, also with another
batch size.

A function of a bucket takes its ``key``, which is empty where there is one bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from attrs import evolve, frozen
from distill_protocols import LatentShape, derive_seed
from torch import Tensor

from distill_conditioning.buckets import Position

Key = Sequence[str]


@frozen(kw_only=True)
class BucketOrder:
    """Says from which bucket the group at a position comes.

    It is drawn by (seed, number of the group), because a fixed turn could meet that of a method's
    updates. Only buckets that are behind their share are drawn, with a chance that grows with what
    they lack. With g samples a group and n buckets, a bucket is then less than g samples above its
    share of all samples so far, and less than (n - 1) g below it: only one that would lack
    something after the coming group can get that group, and what a bucket lacks the others have.

    Attributes:
        seed: of the run.
        shares: of the buckets, 1 together.
        group_size: samples in a group.
    """

    seed: int
    shares: tuple[Fraction, ...]
    group_size: int

    def bucket(self, position: Position) -> int:
        """Return the number of the bucket that the group under way comes from."""
        if len(self.shares) == 1:
            return 0
        after = sum(position.taken) + self.group_size
        behind = [
            max(share * after - taken, Fraction())
            for share, taken in zip(self.shares, position.taken, strict=True)
        ]
        left = Fraction(derive_seed(self.seed, "data.bucket", position.groups), 2**63) * sum(behind)
        for number, size in enumerate(behind):
            left -= size
            if left < 0:
                return number
        raise AssertionError("a draw below the sum lies in one of the parts")

    def advance(self, position: Position, count: int) -> Position:
        """Return the position after ``count`` further samples of the group under way."""
        offset = position.offset + count
        if offset < self.group_size:
            return evolve(position, offset=offset)
        taken = list(position.taken)
        taken[self.bucket(position)] += offset
        return Position(taken=tuple(taken), groups=position.groups + 1)


def choose_clip(seed: int, group: int, clips: Sequence[LatentShape]) -> LatentShape | None:
    """Draw the shape of the clips that are to be made for the captions of a group."""
    return clips[derive_seed(seed, "data.clip", group) % len(clips)] if clips else None


def epoch_order(seed: int, epoch: int, samples: int, *, shuffle: bool, key: Key = ()) -> Tensor:
    """Order the samples of one epoch (counted from 0): int64 [samples], each number once."""
    if not shuffle:
        return torch.arange(samples)
    generator = torch.Generator().manual_seed(derive_seed(seed, "data.order", *key, epoch))
    return torch.randperm(samples, generator=generator)


def rank_positions(first: int, batch_size: int, rank: int, world_size: int) -> range:
    """Return the stream positions of one rank in the global batch that begins at ``first``: every
    ``world_size``-th, so that the global batch is the same set for any number of ranks."""
    return range(first + rank, first + batch_size * world_size, world_size)


def drops_condition(
    seed: int, epoch: int, sample: int, rate: float, *, key: Key = (), part: str | None = None
) -> bool:
    """Tell whether ``sample`` loses its caption in ``epoch``: true with probability ``rate``.

    Args:
        part: the condition tensor that is lost; None: all, by one draw.
    """
    purpose = "data.dropout" if part is None else f"data.dropout.{part}"
    return derive_seed(seed, purpose, *key, epoch, sample) < rate * 2**63


def choose_negative(seed: int, epoch: int, sample: int, count: int, *, key: Key = ()) -> int:
    """Draw which of ``count`` negative conditions takes the place of the caption of ``sample``."""
    return derive_seed(seed, "data.negative", *key, epoch, sample) % count


def choose_caption(seed: int, epoch: int, sample: int, *, key: Key = ()) -> int:
    """Draw which caption of ``sample`` is read in ``epoch``: its remainder by their number."""
    return derive_seed(seed, "data.caption", *key, epoch, sample)
