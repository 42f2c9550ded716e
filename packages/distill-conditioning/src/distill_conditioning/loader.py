"""The endless loader of latents."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import cast

import torch
from attrs import evolve, frozen
from distill_protocols import (
    Batch,
    Condition,
    ConditioningError,
    DataError,
    LatentShape,
    map_latents,
)
from torch import Tensor

from distill_conditioning.buckets import (
    Position,
    describe_order,
    load_position,
    make_buckets,
    position_problem,
    save_position,
)
from distill_conditioning.held_out import DataPart
from distill_conditioning.order import (
    BucketOrder,
    choose_caption,
    choose_clip,
    choose_negative,
    drops_condition,
    epoch_order,
    rank_positions,
)
from distill_conditioning.reading import LatentDataset

AHEAD_PER_WORKER = 2
"""Batches per worker: one that it reads, one that waits for the step."""


class LatentLoader:
    """Batches for one data-parallel rank, without end; a ``BatchLoader``.

    Order (``dataset.config.shuffle``), the choice of captions and condition dropout are functions
    of (seed, epoch, sample) alone: see ``distill_conditioning.order``. All samples of a group,
    those of an iteration, come from one bucket: they have one shape, on all ranks. Where an epoch
    of a bucket does not divide by the group, its last group is filled up from the next epoch, so
    that no sample is lost or given twice as often. Captions alone get the shape of clips that are
    to be made for them, drawn for each group among ``dataset.clips``.

    With ``dataset.config.workers`` threads read the batches to come. They are threads and not
    processes because reading is copying out of memory-mapped files, which torch does without
    Python's lock: nothing has to be started, pickled, shared or cleaned up, and no worker can
    outlive the run or be killed on its own. What was read ahead is kept by its position in the
    stream, and the position moves only when a batch is yielded; so whatever the workers do,
    batches and ``state_dict`` are those of a loader without workers. No worker draws a random
    number.

    Args:
        dataset: the samples.
        batch_size: of one rank, one micro step.
        seed: the run's seed.
        dropout: chance that a sample's condition is replaced by ``negative``; or by name of a
            condition tensor, each drawn by itself. One that ``negative`` does not hold, such as an
            image, is replaced by zeros then, as Diffusers does.
        negative: needed where ``dropout`` is above 0; of several rows one is drawn for each sample.
        group_size: samples of an iteration, all micro steps and ranks together; None: there is one
            micro step.
        rank, world_size: among the data-parallel ranks.
        device: where the batches go.
        part: which samples; None: all of them.

    Raises:
        ConditioningError: dropout without a negative condition, or with one of another shape.
        DataError: a group that ends within a batch, where there are several buckets.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        *,
        batch_size: int,
        seed: int,
        dropout: float | Mapping[str, float] = 0.0,
        negative: Condition | None = None,
        group_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        part: DataPart | None = None,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise DataError(
                f"batch_size {batch_size}, rank {rank} of {world_size}: a batch needs at least "
                "one sample, and ranks count from 0 to world_size - 1"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = dataset.config.shuffle
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self._dropout = Dropout.of(dropout, negative, dataset)
        buckets = make_buckets(dataset.sources)
        self._part = part
        self._buckets = buckets if part is None else part.of(buckets)
        self._clips = dataset.clips if self._buckets[0].shape.latents is None else ()
        self._order = BucketOrder(
            seed=seed,
            shares=tuple(bucket.share for bucket in self._buckets),
            group_size=self._stride if group_size is None else group_size,
        )
        self._has_groups = len(self._buckets) > 1 or len(self._clips) > 1
        if self._has_groups and self._order.group_size % self._stride:
            raise DataError(
                f"a group of {self._order.group_size} samples is no whole number of batches of "
                f"{batch_size} on {world_size} rank(s), and all of it must have one shape. Choose "
                "a global batch that divides by them"
            )
        self._numbers = [torch.cat([_as_tensor(r) for r in b.numbers]) for b in self._buckets]
        self._position = Position(taken=(0,) * len(self._buckets))
        self._epoch_orders: dict[tuple[int, int], Tensor] = {}
        self._ahead: dict[Position, Future[Batch]] = {}
        workers = dataset.config.workers
        self._threads = ThreadPoolExecutor(workers, "data-worker") if workers > 0 else None

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the loader's position on, which all iterators share."""
        try:
            while True:
                position = self._position
                batch = _copy_to(self._batch(position), self.device)
                self._position = self._order.advance(position, self._stride)
                yield batch
        finally:
            self._cancel_all_but([])

    @property
    def epoch(self) -> float:
        """How many times all ranks together have gone through the data sets so far."""
        return self._position.samples / sum(map(len, self._buckets))

    def state_dict(self) -> dict[str, object]:
        """Return the position in the stream of all ranks (JSON), for any number of ranks."""
        return {
            **save_position(self._position, self._buckets, self._group_size),
            **self._decided,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue after the last batch that was yielded before ``state`` was taken.

        Raises:
            DataError: other data sets, seed or shuffling, with which the rest of the epoch
                would be other samples than those that are still to come; or a position within a
                group that this loader would cut otherwise.
        """
        problem = position_problem(state, self._decided)
        if problem is not None:
            raise DataError(
                f"{problem}. Put data set and run file back as they were, or start a new run with "
                "another output_dir."
            )
        self._position = load_position(
            state, self._buckets, group_size=self._group_size, stride=self._stride
        )

    @cached_property
    def _decided(self) -> dict[str, object]:
        return describe_order(
            self.dataset.sources,
            seed=self.seed,
            shuffle=self.shuffle,
            held_out=0.0 if self._part is None else self._part.share,
        )

    @property
    def _group_size(self) -> int | None:
        """Samples of a group; None where nothing depends on groups."""
        return self._order.group_size if self._has_groups else None

    @property
    def _stride(self) -> int:
        return self.batch_size * self.world_size

    def _batch(self, position: Position) -> Batch:
        """Return this rank's batch of the global batch that begins at ``position``."""
        if self._threads is None:
            return self._read(self._choose(position))
        coming = [position]
        for _ in range(AHEAD_PER_WORKER * self.dataset.config.workers):
            coming.append(self._order.advance(coming[-1], self._stride))
        self._cancel_all_but(coming)
        for each in coming:
            if each not in self._ahead:
                # Chosen in this thread and read in another: so the orders need no lock.
                self._ahead[each] = self._threads.submit(self._read, self._choose(each))
        return self._ahead.pop(position).result()

    def _cancel_all_but(self, coming: Collection[Position]) -> None:
        """Drop batches that were read ahead in vain: after ``load_state_dict``, or at the end."""
        for each in [each for each in self._ahead if each not in coming]:
            self._ahead.pop(each).cancel()

    def _choose(self, position: Position) -> _Choice:
        """Choose samples, their captions, and whose condition is dropped."""
        number = self._order.bucket(position)
        bucket, size = self._buckets[number], len(self._buckets[number])
        first = position.taken[number] + position.offset
        positions = rank_positions(first, self.batch_size, self.rank, self.world_size)
        self._drop_old_orders()
        samples: list[tuple[int, int]] = []
        for epoch, places in itertools.groupby(positions, lambda place: place // size):
            # One look-up an epoch: one a sample would be a third of the time of a tiny batch.
            inside = torch.tensor([place % size for place in places])
            samples += [(epoch, own) for own in self._samples(number, epoch)[inside].tolist()]
        return _Choice(
            clip=choose_clip(self.seed, position.groups, self._clips),
            numbers=self._numbers[number][[sample for _, sample in samples]],
            samples=samples,
            key=bucket.key,
            dropped={
                part: torch.tensor(
                    [
                        drops_condition(self.seed, *sample, rate, key=bucket.key, part=part)
                        for sample in samples
                    ]
                )
                for part, rate in self._dropout.rates.items()
            },
        )

    def _read(self, choice: _Choice) -> Batch:
        captions = None
        if self.dataset.has_several_captions(choice.numbers):
            draws = [choose_caption(self.seed, *own, key=choice.key) for own in choice.samples]
            captions = torch.tensor(draws)
        batch = self.dataset.read(choice.numbers, captions, clip=choice.clip)
        negatives, count = torch.zeros(len(choice.samples), dtype=torch.int64), self._dropout.count
        if count > 1:
            draws = [choose_negative(self.seed, *n, count, key=choice.key) for n in choice.samples]
            negatives = torch.tensor(draws)
        self._dropout.apply(batch.cond, choice.dropped, negatives)
        return batch

    def _samples(self, bucket: int, epoch: int) -> Tensor:
        """Return the order of a bucket's samples in an epoch, by their numbers in the bucket."""
        if (bucket, epoch) not in self._epoch_orders:
            own = self._buckets[bucket]
            self._epoch_orders[bucket, epoch] = epoch_order(
                self.seed, epoch, len(own), shuffle=self.shuffle, key=own.key
            )
        return self._epoch_orders[bucket, epoch]

    def _drop_old_orders(self) -> None:
        """Forget the orders of epochs that are over."""
        now = [
            taken // len(bucket)
            for taken, bucket in zip(self._position.taken, self._buckets, strict=True)
        ]
        self._epoch_orders = {
            (bucket, epoch): order
            for (bucket, epoch), order in self._epoch_orders.items()
            if epoch >= now[bucket]
        }


@frozen(eq=False, kw_only=True)
class _Choice:
    """What a batch is read from.

    Attributes:
        clip: (C, T, H, W) of what is to be made for captions alone.
        numbers: int64 [B], of samples.
        samples: of each its epoch, and its number within the bucket of ``key``.
        dropped: bool [B], by condition tensor; under None, all of the negative condition's.
    """

    clip: LatentShape | None
    numbers: Tensor
    samples: Sequence[tuple[int, int]]
    key: Sequence[str]
    dropped: Mapping[str | None, Tensor]


@frozen(eq=False, kw_only=True)
class Dropout:
    """What takes the place of conditions, and how often.

    Attributes:
        rates: by name of a condition tensor; under None, for all of ``rows`` by one draw.
        rows: on the CPU; one of them for each sample.
    """

    rates: Mapping[str | None, float]
    rows: Condition

    @property
    def count(self) -> int:
        """Number of negative conditions."""
        return max(1, len(self.rows))

    @classmethod
    def of(
        cls, rate: float | Mapping[str, float], negative: Condition | None, dataset: LatentDataset
    ) -> Dropout:
        """Check the negative condition of a loader, and add zeros where it lacks a tensor.

        Raises:
            ConditioningError: there is none, it does not fit, or the samples lack a named tensor.
        """
        by_name = isinstance(rate, Mapping)
        rates: dict[str | None, float] = {**rate} if by_name else {None: cast(float, rate)}
        rates = {name: chance for name, chance in rates.items() if chance > 0}
        if not rates:
            return cls(rates={}, rows=Condition({}))
        shapes = dataset.sources[0].index.shapes[0].conditions
        unknown = [name for name in rates if name is not None and name not in shapes]
        if unknown:
            raise ConditioningError(
                f"condition dropout of {', '.join(map(str, unknown))}, but the samples have "
                f"{', '.join(shapes)} alone. Name one of these"
            )
        return cls(rates=rates, rows=_check_negative(negative, dataset, rate))

    def apply(self, cond: Condition, dropped: Mapping[str | None, Tensor], chosen: Tensor) -> None:
        """Write the chosen rows [B] over dropped rows of a batch's own tensors; tensors that they
        do not hold stay, as an image does where a caption is dropped, or become zeros where they
        are dropped by name."""
        for part, is_dropped in dropped.items():
            for name in self.rows.tensors if part is None else (part,):
                own = cond.tensors[name]
                values = self.rows.tensors.get(name)
                own[is_dropped] = 0 if values is None else values[chosen[is_dropped]].to(own.dtype)


def _check_negative(negative: Condition | None, dataset: LatentDataset, rate: object) -> Condition:
    if negative is None:
        raise ConditioningError(
            f"condition dropout is {rate}, but there is no negative condition to "
            "put in a caption's place. Set ConditioningConfig.negative_prompt, use a data set "
            "with constants, or set the dropout to 0."
        )
    shapes = {name: tuple(value.shape) for name, value in negative.tensors.items()}
    for source in dataset.sources:
        for shape in source.index.shapes:
            needed = {name: (len(negative), *row) for name, row in shape.conditions.items()}
            if not shapes or not shapes.items() <= needed.items():
                raise ConditioningError(
                    f"the negative condition is {shapes}, but the samples of {source.path} need "
                    f"{needed}, since it takes their place. Preprocess the data set with the "
                    "encoder of the run's model."
                )
    return negative.to("cpu")


def _copy_to(batch: Batch, device: torch.device) -> Batch:
    """Copy to an accelerator through pinned memory, so that the copy runs during computation."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != device.type:
        return batch.to(device)

    def move(value: Tensor) -> Tensor:
        return value.pin_memory().to(device, non_blocking=True)

    return evolve(
        batch,
        latents=None if batch.latents is None else map_latents(move, batch.latents),
        cond=Condition({name: move(value) for name, value in batch.cond.tensors.items()}),
        trajectory=None if batch.trajectory is None else move(batch.trajectory),
    )


def _as_tensor(numbers: range) -> Tensor:
    return torch.arange(numbers.start, numbers.stop)
