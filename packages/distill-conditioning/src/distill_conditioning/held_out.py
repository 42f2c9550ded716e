"""Samples of a data set that are never trained on, so that losses can be measured on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from attrs import evolve, frozen
from distill_protocols import DataError, derive_seed
from torch import Tensor

from distill_conditioning.buckets import Bucket, count_held_out


@frozen(kw_only=True)
class DataPart:
    """One of the two parts that a share of a data set divides it into.

    Which samples are held out is a function of the data set and the share alone, so that runs of
    other seeds and methods hold out the same ones. They are drawn one by one: where several
    samples were cut from one video, some of them may be on either side.

    Attributes:
        share: of the samples of each bucket, held out.
        is_held_out: the samples that are held out; otherwise the others.
    """

    share: float
    is_held_out: bool

    def of(self, buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
        """Return this part of each bucket; one that has no sample of it is left out.

        Raises:
            DataError: there is no sample of it at all.
        """
        parts = []
        for bucket in buckets:
            numbers = torch.cat([torch.arange(r.start, r.stop) for r in bucket.numbers])
            generator = torch.Generator().manual_seed(derive_seed(0, "data.held_out", *bucket.key))
            held_out = torch.zeros(len(numbers), dtype=torch.bool)
            order = torch.randperm(len(numbers), generator=generator)
            held_out[order[: count_held_out(len(bucket), self.share)]] = True
            own = numbers[held_out if self.is_held_out else ~held_out]
            if len(own):
                parts.append(evolve(bucket, numbers=tuple(_ranges(own))))
        if not parts:
            raise DataError(
                f"a share of {self.share:g} of {sum(map(len, buckets))} samples is none, so there "
                "is nothing to measure on. Hold out more of them, or use data of their own"
            )
        total = sum((part.share for part in parts), Fraction())
        return tuple(evolve(part, share=part.share / total) for part in parts)


def _ranges(numbers: Tensor) -> Iterator[range]:
    """Yield runs of rising ``numbers`` that follow each other."""
    ends = (numbers.diff() != 1).nonzero()[:, 0] + 1
    for run in numbers.tensor_split(ends):
        yield range(int(run[0]), int(run[-1]) + 1)
