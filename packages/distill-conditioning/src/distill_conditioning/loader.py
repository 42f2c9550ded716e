"""The endless loader of latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from distill_protocols import Batch, Condition
from distill_protocols.errors import ConditioningError, DataError
from torch import Tensor

from distill_conditioning.order import drops_condition, epoch_order, rank_positions
from distill_conditioning.shards import LatentDataset


class LatentLoader:
    """Batches for one data-parallel rank, without end; a ``BatchLoader``.

    Order (``dataset.config.shuffle``) and condition dropout are functions of (seed, epoch, sample)
    alone: see ``distill_conditioning.order``. The
    global batch is ``batch_size * world_size`` samples; where an epoch does not divide by it, its
    last batch is filled up from the next epoch, so that no sample is lost or given twice as often.

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
        self._negative = self._usable_negative(negative) if dropout > 0 else None
        self._samples_given = 0
        self._orders: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[Batch]:
        """From wherever the loader stands; all iterators share that position."""
        while True:
            first = self._samples_given
            positions = rank_positions(first, self.batch_size, self.rank, self.world_size)
            batch = self._batch(positions)
            self._samples_given = first + self.batch_size * self.world_size
            yield batch

    @property
    def epoch(self) -> float:
        """How often the data set was seen so far, by all ranks together."""
        return self._samples_given / len(self.dataset)

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream of all ranks together (JSON); valid for any number of ranks."""
        return {
            "samples_given": self._samples_given,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "dataset_samples": len(self.dataset),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the last batch that was given before ``state`` was taken.

        Raises:
            DataError: another data set size, seed or shuffling, with which the rest of the epoch
                would be other samples than those that are still to come.
        """
        own = self.state_dict()
        changed = [
            f"{key} was {state[key]} and is {own[key]}"
            for key in ("dataset_samples", "seed", "shuffle")
            if state[key] != own[key]
        ]
        if changed:
            raise DataError(
                f"the data position of the checkpoint does not fit this run: {'; '.join(changed)}."
                " They decide the order, so the run could not go on where it stopped. Put data "
                "set and run file back as they were, or start a new run with another output_dir."
            )
        self._samples_given = int(state["samples_given"])

    def _batch(self, positions: range) -> Batch:
        places = [divmod(position, len(self.dataset)) for position in positions]
        self._keep_orders(places[0][0])
        samples = [int(self._order(epoch)[place]) for epoch, place in places]
        batch = self.dataset.read(torch.tensor(samples))
        if self._negative is not None:
            dropped = [
                drops_condition(self.seed, epoch, sample, self.dropout)
                for (epoch, _), sample in zip(places, samples, strict=True)
            ]
            _replace_rows(batch.cond, torch.tensor(dropped), self._negative)
        return _on_device(batch, self.device)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders[epoch] = epoch_order(
                self.seed, epoch, len(self.dataset), shuffle=self.shuffle
            )
        return self._orders[epoch]

    def _keep_orders(self, epoch: int) -> None:
        self._orders = {e: order for e, order in self._orders.items() if e >= epoch}

    def _usable_negative(self, negative: Condition | None) -> Condition:
        if negative is None:
            raise ConditioningError(
                f"condition dropout is {self.dropout:g}, but there is no negative condition to "
                "put in a caption's place. Set conditioning.negative_prompt, use a data set with "
                "constants, or set conditioning.dropout to 0."
            )
        found = {name: tuple(value.shape) for name, value in negative.tensors.items()}
        wanted = {name: (1, *shape) for name, shape in self.dataset.index.conditions.items()}
        if found != wanted:
            raise ConditioningError(
                f"the negative condition is {found}, but the samples of {self.dataset.path} need "
                f"{wanted}, since it takes their place. Preprocess the data set with the encoder "
                "of the run's model."
            )
        return negative.to("cpu")


def _on_device(batch: Batch, device: torch.device) -> Batch:
    """To an accelerator through pinned memory, so that the copy runs beside the computation."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != device.type:
        return batch.to(device)

    def moved(value: Tensor) -> Tensor:
        return value.pin_memory().to(device, non_blocking=True)

    tensors = {name: moved(value) for name, value in batch.cond.tensors.items()}
    return Batch(latents=moved(batch.latents), cond=Condition(tensors), ids=batch.ids)


def _replace_rows(condition: Condition, rows: Tensor, row: Condition) -> None:
    """Write the one row of ``row`` over the ``rows`` (bool [B]) of a batch's own tensors."""
    for name, value in condition.tensors.items():
        value[rows] = row.tensors[name].to(value.dtype)
