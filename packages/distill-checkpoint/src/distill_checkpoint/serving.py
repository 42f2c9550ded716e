"""Weights that lie in parts on several ranks, read whole by one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping

from attrs import frozen
from distill_protocols import CheckpointError, TensorInfo, TensorWeights, WeightSource
from distill_runtime import Ranks
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from distill_checkpoint.tensors import to_whole

Request = tuple[str, str] | None
"""(module, name) of the tensor that rank 0 wants next; None: it is done."""


def ranks_that_save(timeout: float) -> Ranks:
    """All ranks call it together: a group for what is written and read, beside that of training."""
    return Ranks.of_this_run(
        timeout,
        error=CheckpointError,
        advice="; for slow storage, raise checkpoint.timeout_seconds",
    )


def served(
    ranks: Ranks,
    weights: Mapping[str, TensorWeights],
    action: Callable[[Mapping[str, WeightSource]], None],
) -> None:
    """Rank 0 does ``action`` with sources of whole tensors; the others give their parts to it.

    A whole tensor is on each rank only while it is read, and one at a time.

    Args:
        ranks: all of them call this together.
        weights: by module, of this rank: parts (DTensor) or whole ones.

    Raises:
        DistillError: ``action`` failed, or a rank was lost: an error on all.
    """
    sources = {key: ServedWeights(own, key, ranks) for key, own in weights.items()}
    if ranks.group is None:
        action(sources)
    else:
        ranks.gather_results(
            lambda: _lead(ranks, sources, action) if ranks.is_first else _follow(ranks, weights)
        )


@frozen(eq=False)
class ServedWeights(WeightSource):
    """The source of one module on rank 0, within ``served``."""

    weights: TensorWeights
    _key: str
    _ranks: Ranks

    @property
    def where(self) -> str:
        return self.weights.where

    def describe(self) -> Mapping[str, TensorInfo]:
        """Of whole tensors."""
        return self.weights.describe()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of ``names`` on the CPU, put together from the parts of all ranks."""
        return {name: self._read(name) for name in names}

    def _read(self, name: str) -> Tensor:
        tensor = self.weights.tensors[name].detach()
        if isinstance(tensor, DTensor):
            _next(self._ranks, (self._key, name))
            with self._ranks.within_timeout():
                tensor = to_whole(tensor)
        return tensor.cpu()


def _lead(
    ranks: Ranks,
    sources: Mapping[str, WeightSource],
    action: Callable[[Mapping[str, WeightSource]], None],
) -> None:
    try:
        action(sources)
    except BaseException:
        # The error under way is the one to hear of, not that nobody listens any more.
        with contextlib.suppress(CheckpointError):
            _next(ranks, None)
        raise
    _next(ranks, None)


def _follow(ranks: Ranks, weights: Mapping[str, TensorWeights]) -> None:
    while (request := _next(ranks, None)) is not None:
        key, name = request
        with ranks.within_timeout():
            to_whole(weights[key].tensors[name].detach())


def _next(ranks: Ranks, request: Request) -> Request:
    """What rank 0 wants, on every rank; theirs alone counts."""
    if ranks.group is None:
        return request
    told = [request]
    with ranks.within_timeout():
        distributed.broadcast_object_list(told, src=0, group=ranks.group)
    return told[0]
