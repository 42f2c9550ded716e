"""The method's own losses on data that are not trained on. Measuring them never changes the run."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from distill_protocols import (
    BatchLoader,
    HeldOutEvaluating,
    RunState,
    TrainableMethod,
)
from distill_runtime import fetch_floats, full_tensor
from torch import Tensor

from distill_trainer.distribution.tensors import persistent_buffers, read_buffer
from distill_trainer.validation.modes import eval_mode

_log = logging.getLogger(__name__)

FIRST_ITERATION = 10_000_001
"""Above every iteration of a run, so that a loss is measured as the run ends with it (whatever
warms up is warm), and with the same draws whichever iteration measures it."""
_SCHEDULE = 1_000
"""No schedule of updates is longer."""


@frozen(kw_only=True)
class HeldOutLosses:
    """Losses at equal weights, with equal times, noises and exit steps, by name of the term.

    Attributes:
        held_out: on samples that are not trained on.
        training: on as many that are.
    """

    held_out: Mapping[str, float]
    training: Mapping[str, float]

    def metrics(self) -> dict[str, float]:
        """Return ``validation/loss/<term>``, and ``validation/drift/<term>``: what the loss is
        larger by than on the training data."""
        losses = {f"validation/loss/{name}": value for name, value in self.held_out.items()}
        drift = {
            f"validation/drift/{name}": value - self.training[name]
            for name, value in self.held_out.items()
            if name in self.training
        }
        return losses | drift


class LossEvaluator:
    """Measures the losses of a method's steps on held-out data and on training data.

    The same micro batches go through ``single_train_step`` each time, under the method's autocast,
    without gradient, in eval mode, with random streams of a seed of their own: both kinds of data,
    and all validations, get the same times, noises and exit steps. Afterwards generators, state of
    the method, buffers and modes are what they were; weights, optimizers, update counts and the
    run's own loader are not touched.

    A step has the losses of the roles whose turn its iteration is. So a micro batch makes a step
    for as many iterations as are needed until each role had its turn; over the micro batches these
    iterations move on, as experts of a role are drawn by iteration.

    Args:
        held_out, training: batches of samples of either kind; each is put back to where it was
            before every measurement. All ranks have loaders of the same global batches.
        batches: micro batches of each kind.
        seed: of the random streams.
    """

    def __init__(
        self, held_out: BatchLoader, training: BatchLoader, *, batches: int, seed: int
    ) -> None:
        self._loaders = held_out, training
        self._starts = [copy.deepcopy(loader.state_dict()) for loader in self._loaders]
        self._batches = batches
        self._seed = seed

    def evaluate(self, run: RunState) -> HeldOutLosses:
        """Measure; the same numbers on all ranks, which call it together.

        Raises:
            StopRequested: the run is to stop; it is as it was before.
        """
        plan = TurnPlan.of(run.method, self._batches)
        found = []
        for loader, start in zip(self._loaders, self._starts, strict=True):
            # Both from the run's own state: a method may go on from what its last step left.
            with _unmoved(run):
                found.append(self._mean_losses(run, loader, start, plan))
        held_out, training = found
        if not held_out and run.ranks.is_first:
            _log.warning(
                "validation: %s returns total_loss alone, and roles step in turns, so that it is "
                "another sum in each iteration and is not measured on held-out data. Let "
                "single_train_step name its terms",
                type(run.method).__name__,
            )
        return HeldOutLosses(held_out=held_out, training=training)

    def _mean_losses(
        self,
        run: RunState,
        loader: BatchLoader,
        start: Mapping[str, object],
        plan: TurnPlan,
    ) -> dict[str, float]:
        """Return the means over micro batches and ranks."""
        method = run.method
        values: dict[str, list[Tensor | float]] = defaultdict(list)
        loader.load_state_dict(copy.deepcopy(start))
        with contextlib.ExitStack() as stack:
            for streams in {id(s): s for s in (method.streams, run.streams)}.values():
                stack.enter_context(streams.replaced(self._seed))
            stack.enter_context(torch.no_grad())
            stack.enter_context(eval_mode(method.model_dict.values()))
            batches = iter(loader)
            for number in range(self._batches):
                batch = next(batches)
                for iterations in plan.iterations:
                    method.stop.poll()
                    for name, loss in _losses(method, batch, iterations[number]).items():
                        values[name].append(full_tensor(loss.detach()))
        if not plan.has_total_loss:
            values.pop("total_loss", None)
        numbers = iter(fetch_floats([value for column in values.values() for value in column]))
        own = {
            name: sum(next(numbers) for _ in column) / len(column)
            for name, column in values.items()
        }
        everywhere = run.ranks.gather_results(lambda: own)
        names = dict.fromkeys(name for rank in everywhere for name in rank)
        return {
            name: sum(column) / len(column)
            for name in names
            if (column := [rank[name] for rank in everywhere if name in rank])
        }


def _losses(method: TrainableMethod, batch: Any, iteration: int) -> dict[str, Tensor]:
    with method.autocast():
        losses = dict(method.single_train_step(batch, iteration).loss_map)
        if isinstance(method, HeldOutEvaluating):
            losses |= method.evaluate_held_out(batch, iteration)
    return losses


@frozen(kw_only=True)
class TurnPlan:
    """Iterations whose steps have all losses of a method.

    Attributes:
        iterations: for each kind of turns that is needed, one a micro batch.
        has_total_loss: whether ``total_loss`` is the sum of the same terms in all iterations.
    """

    iterations: Sequence[Sequence[int]]
    has_total_loss: bool

    @classmethod
    def of(cls, method: TrainableMethod, batches: int) -> TurnPlan:
        """Choose as few kinds of turns as let every optimizer step that steps at all, from
        ``FIRST_ITERATION`` on."""
        by_turn: dict[frozenset[str], list[int]] = defaultdict(list)
        for iteration in range(FIRST_ITERATION, FIRST_ITERATION + _SCHEDULE):
            by_turn[frozenset(method.get_optimizers(iteration))].append(iteration)
        chosen: list[list[int]] = []
        missing = set(method.optimizer_dict)
        # The turns in which most roles step first: their iteration has most losses at once.
        for keys in sorted(by_turn, key=lambda keys: (-len(keys), by_turn[keys][0])):
            if keys & missing:
                chosen.append(by_turn[keys])
                missing -= keys
        return cls(
            iterations=[[own[n % len(own)] for n in range(batches)] for own in chosen],
            has_total_loss=len(by_turn) == 1,
        )


@contextlib.contextmanager
def _unmoved(run: RunState) -> Iterator[None]:
    """After: everything that a step moves before its optimizers is as it was, bit for bit."""
    method = run.method
    buffers = persistent_buffers(method.bundle)
    values = [read_buffer(module, name).clone() for module, name in buffers]
    state, of_rank = copy.deepcopy(method.state_dict()), method.rank_state()
    generator = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        for (module, name), value in zip(buffers, values, strict=True):
            read_buffer(module, name).copy_(value)
        method.load_state_dict(state)
        method.load_rank_state(of_rank)
        torch.set_rng_state(generator)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
