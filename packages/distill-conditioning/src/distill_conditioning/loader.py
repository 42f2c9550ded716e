"""The endless loader of latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import cast

import torch
from attrs import evolve
from distill_protocols import Batch, Condition, ConditioningError, DataError
from torch import Tensor

from distill_conditioning.format import position_problem
from distill_conditioning.order import drops_condition, epoch_order, rank_positions
from distill_conditioning.reading import LatentDataset

AHEAD_PER_WORKER = 2
"""Batches per worker: one that it reads, one that waits for the step."""


class LatentLoader:
    """Batches for one data-parallel rank, without end; a ``BatchLoader``.

    Order (``dataset.config.shuffle``) and condition dropout are functions of (seed, epoch, sample)
    alone: see ``distill_conditioning.order``. The
    global batch is ``batch_size * world_size`` samples; where an epoch does not divide by it, its
    last batch is filled up from the next epoch, so that no sample is lost or given twice as often.

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
        dropout: chance that a sample's condition is replaced by ``negative``.
        negative: one row; needed where ``dropout`` is above 0.
        rank, world_size: among the data-parallel ranks.
        device: where the batches go.

    Raises:
        ConditioningError: dropout without a negative condition, or with one of another shape.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        *,
        batch_size: int,
        seed: int,
        dropout: float = 0.0,
        negative: Condition | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
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
        self.dropout = dropout
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self._negative = self._check_negative(negative) if dropout > 0 else None
        self._samples_yielded = 0
        self._orders: dict[int, Tensor] = {}
        self._ahead: dict[int, Future[Batch]] = {}
        workers = dataset.config.workers
        self._threads = ThreadPoolExecutor(workers, "data-worker") if workers > 0 else None

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the loader's position on, which all iterators share."""
        try:
            while True:
                first = self._samples_yielded
                batch = _copy_to(self._batch(first), self.device)
                self._samples_yielded = first + self._stride
                yield batch
        finally:
            self._cancel_all_but(range(0))

    @property
    def epoch(self) -> float:
        """How many times all ranks together have gone through the data set so far."""
        return self._samples_yielded / len(self.dataset)

    def state_dict(self) -> dict[str, object]:
        """Return the position in the stream of all ranks (JSON), for any number of ranks."""
        return {
            "samples_given": self._samples_yielded,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "dataset_samples": len(self.dataset),
            "dataset": self.dataset.content_hash,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue after the last batch that was yielded before ``state`` was taken.

        Raises:
            DataError: another data set, seed or shuffling, with which the rest of the epoch
                would be other samples than those that are still to come.
        """
        problem = position_problem(state, self.state_dict())
        if problem is not None:
            raise DataError(
                f"{problem}. Put data set and run file back as they were, or start a new run with "
                "another output_dir."
            )
        self._samples_yielded = int(cast(int, state["samples_given"]))

    @property
    def _stride(self) -> int:
        return self.batch_size * self.world_size

    def _batch(self, first: int) -> Batch:
        """Return this rank's batch of the global batch that begins at ``first``."""
        if self._threads is None:
            return self._read(*self._choose(first))
        count = 1 + AHEAD_PER_WORKER * self.dataset.config.workers
        coming = range(first, first + count * self._stride, self._stride)
        self._cancel_all_but(coming)
        for each in coming:
            if each not in self._ahead:
                # Chosen in this thread and read in another: so the orders need no lock.
                self._ahead[each] = self._threads.submit(self._read, *self._choose(each))
        return self._ahead.pop(first).result()

    def _cancel_all_but(self, coming: range) -> None:
        """Drop batches that were read ahead in vain: after ``load_state_dict``, or at the end."""
        for first in [first for first in self._ahead if first not in coming]:
            self._ahead.pop(first).cancel()

    def _choose(self, first: int) -> tuple[Tensor, Tensor]:
        """Choose sample numbers, and whose condition is dropped: int64 and bool [B]."""
        positions = rank_positions(first, self.batch_size, self.rank, self.world_size)
        places = [divmod(position, len(self.dataset)) for position in positions]
        self._keep_orders(self._samples_yielded // len(self.dataset))
        samples = [int(self._order(epoch)[place]) for epoch, place in places]
        dropped = [
            self._negative is not None and drops_condition(self.seed, epoch, sample, self.dropout)
            for (epoch, _), sample in zip(places, samples, strict=True)
        ]
        return torch.tensor(samples), torch.tensor(dropped)

    def _read(self, samples: Tensor, dropped: Tensor) -> Batch:
        batch = self.dataset.read(samples)
        if self._negative is not None:
            _replace_rows(batch.cond, dropped, self._negative)
        return batch

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders[epoch] = epoch_order(
                self.seed, epoch, len(self.dataset), shuffle=self.shuffle
            )
        return self._orders[epoch]

    def _keep_orders(self, epoch: int) -> None:
        self._orders = {e: order for e, order in self._orders.items() if e >= epoch}

    def _check_negative(self, negative: Condition | None) -> Condition:
        if negative is None:
            raise ConditioningError(
                f"condition dropout is {self.dropout:g}, but there is no negative condition to "
                "put in a caption's place. Set ConditioningConfig.negative_prompt, use a data set "
                "with constants, or set the dropout to 0."
            )
        shapes = {name: tuple(value.shape) for name, value in negative.tensors.items()}
        rows = self.dataset.index.shapes[0].conditions
        needed = {name: (1, *shape) for name, shape in rows.items()}
        if not shapes or not shapes.items() <= needed.items():
            raise ConditioningError(
                f"the negative condition is {shapes}, but the samples of {self.dataset.path} need "
                f"{needed}, since it takes their place. Preprocess the data set with the encoder "
                "of the run's model."
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
        latents=move(batch.latents),
        cond=Condition({name: move(value) for name, value in batch.cond.tensors.items()}),
        trajectory=None if batch.trajectory is None else move(batch.trajectory),
    )


def _replace_rows(condition: Condition, rows: Tensor, row: Condition) -> None:
    """Write the one row of ``row`` over the ``rows`` (bool [B]) of a batch's own tensors; those
    that ``row`` does not hold stay, as an image does where a caption is dropped."""
    for name, value in row.tensors.items():
        own = condition.tensors[name]
        own[rows] = value.to(own.dtype)
