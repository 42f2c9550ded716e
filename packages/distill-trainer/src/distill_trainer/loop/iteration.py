"""One iteration of training: micro steps, gradients, optimizer steps, and the record of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from distill_protocols import (
    Callback,
    ContractError,
    DataError,
    EndingTurns,
    EndTurn,
    RunState,
    StepRecord,
    StepResult,
    StopRequested,
    TrainableMethod,
)
from distill_runtime import full_tensor
from torch import Tensor

from distill_trainer.distribution.strategy import Distribution
from distill_trainer.distribution.tensors import total_norm
from distill_trainer.loop.batches import TimedIterator
from distill_trainer.loop.loss_gradients import NOTHING, LossGradients, measure_losses
from distill_trainer.loop.rollback import RollbackPoint
from distill_trainer.monitoring.finite_guard import FiniteGuard

_log = logging.getLogger(__name__)


class IterationRunner:
    """Runs the iterations of a run, one for each call.

    Args:
        run: a resume is over, so that its loader and its generators are where they shall begin.
        callbacks: in the order of their hooks.
        guard: checks losses and gradients.
        distribution: averages gradients over processes.
        accumulation: micro steps per iteration.
    """

    def __init__(
        self,
        run: RunState,
        callbacks: Sequence[Callback],
        guard: FiniteGuard,
        distribution: Distribution,
        accumulation: int,
    ) -> None:
        self._run = run
        self._callbacks = callbacks
        self._guard = guard
        self._distribution = distribution
        self._accumulation = accumulation
        self._batches = TimedIterator(iter(run.loader))
        self._measures_losses = True
        self._rollback_point = RollbackPoint(run)

    def run_next(self) -> StepRecord | None:
        """Run the next iteration, up to its optimizer steps.

        Returns:
            None if a stop came before the optimizers stepped: the run is then rolled back to the
            end of the iteration before.
        """
        run, method = self._run, self._run.method
        self._rollback_point.take()
        run.iteration += 1
        run.metrics, run.carried = run.carried, {}
        run.measure_losses = False
        try:
            losses, outputs = self._compute_gradients()
        except StopRequested as stop:
            run.request_stop(str(stop))
            self._guard.forget(run.iteration)
            self._distribution.drop_gradients(method)
            self._rollback_point.restore()
            return None
        # The last check before weights move: a rank that is missing here has not stepped, and no
        # other one has, so all can resume from the same checkpoint.
        run.check_in_sync("optimizer step")
        stepped = method.optimizers_schedulers_step(run.iteration)
        method.optimizers_zero_grad(run.iteration)
        run.micro_steps += self._accumulation
        return StepRecord(
            iteration=run.iteration,
            losses=losses,
            metrics=run.metrics,
            outputs=outputs,
            stepped=stepped,
        )

    def _compute_gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run all micro steps, up to gradients that are ready for the optimizers.

        Returns:
            Mean losses over the micro steps, and the outputs of the last one.
        """
        run, method, iteration = self._run, self._run.method, self._run.iteration
        for callback in each_callback(self._callbacks, run, "on_step_start"):
            callback.on_step_start(run)
        losses: list[dict[str, Tensor]] = []
        metrics: list[dict[str, Tensor]] = []
        ids: list[str] = []
        outputs: dict[str, Tensor] = {}
        parts = NOTHING
        for number in range(self._accumulation):
            if number:
                method.stop.poll()  # before the first one, the trainer itself has just asked
            outputs = {}  # frees those of the micro step before, which may be whole clips
            which = f"of micro step {number + 1} of {self._accumulation}"
            run.enter(f"data {which}")
            batch = self._next_batch()
            batch_ids = method.batch_ids(batch)
            ids += batch_ids
            run.enter(f"forward and backward {which}")
            last = number + 1 == self._accumulation
            micro_step = _MicroStep(self, batch_ids, measures=last and run.measure_losses)
            with self._distribution.micro_step(method, iteration, last=last):
                with _ending_turns(method, micro_step.end_turn):
                    loss_map, outputs = self._take_step(batch)
                losses.append(micro_step.end_turn(loss_map))
            del loss_map  # with its graph
            parts = micro_step.parts
            metrics.append(
                {name: full_tensor(value) for name, value in outputs.items() if value.ndim == 0}
            )
        run.metrics |= _mean_by_name(metrics)
        run.metrics["time/data"] = self._batches.reset_seconds()
        run.enter("gradients")
        method.unscale_gradients(iteration)
        norms = _gradient_norms(method, iteration)
        run.metrics |= norms | parts.metrics(norms)
        # Under fp16 scaling such gradients are common, and the scaler leaves their step out.
        watched = {} if method.grad_scaler.is_enabled() else norms
        self._guard.watch_gradients(iteration, watched, ids)
        for callback in each_callback(self._callbacks, run, "on_before_optimizer_step"):
            callback.on_before_optimizer_step(run)
        return _mean_by_name(losses), outputs

    def _next_batch(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            raise DataError(
                f"{type(self._run.loader).__name__} ran out in iteration {self._run.iteration} of "
                f"{self._run.max_train_steps}; a loader with state_dict must yield without end, "
                "because where it starts again is part of its state. Make its __iter__ start "
                "over, or give a plain iterable, which the trainer starts again itself."
            ) from None

    def _take_step(self, batch: Any) -> StepResult:
        method = self._run.method
        # autocast does nothing unless a method overrides it: each role's calls set their own
        # precision.
        with method.autocast():
            loss_map, outputs = method.single_train_step(batch, self._run.iteration)
        if "total_loss" not in loss_map:
            raise ContractError(
                f"{type(method).__name__}.single_train_step returned the losses "
                f"{sorted(loss_map)}; it must return 'total_loss', because that is what is "
                "differentiated. Add loss_map['total_loss']."
            )
        return StepResult(loss_map, outputs)

    def measure_losses(self, loss_map: Mapping[str, Tensor]) -> LossGradients:
        """Return what each loss contributes; nothing where torch cannot tell."""
        if not self._measures_losses:
            return NOTHING
        try:
            return measure_losses(self._run.method, self._run.iteration, loss_map)
        except RuntimeError as error:  # what only watches must not end a run that trains
            self._measures_losses = False
            _log.info("gradients are not measured loss by loss in this run: %s", error)
            return NOTHING

    def differentiate(
        self, loss_map: Mapping[str, Tensor], batch_ids: Sequence[str]
    ) -> dict[str, Tensor]:
        """Add the gradients of the total loss, and return all losses without their graph."""
        method, iteration = self._run.method, self._run.iteration
        losses = {name: full_tensor(loss.detach()) for name, loss in loss_map.items()}
        self._guard.watch(iteration, losses, batch_ids)
        loss = loss_map["total_loss"]
        if self._accumulation > 1:
            # Gradients of micro steps add up: divided here, their sum is that of the mean loss.
            loss = loss / self._accumulation
        method.grad_scaler.scale(loss).backward()
        return losses


class _MicroStep:
    """What one micro step has differentiated, turn by turn.

    Args:
        runner: differentiates.
        batch_ids: of its samples, for error messages.
        measures: whether gradients are measured loss by loss.
    """

    def __init__(
        self, runner: IterationRunner, batch_ids: Sequence[str], *, measures: bool
    ) -> None:
        self._runner = runner
        self._batch_ids = batch_ids
        self._measures = measures
        self.parts = NOTHING

    def end_turn(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Differentiate ``losses["total_loss"]``, and return all losses without their graph."""
        if self._measures:
            self.parts = self.parts.joined(self._runner.measure_losses(losses))
        return self._runner.differentiate(losses, self._batch_ids)


@contextlib.contextmanager
def _ending_turns(method: TrainableMethod, end_turn: EndTurn) -> Iterator[None]:
    """Within: a method whose step has several turns hands over the losses of each."""
    if not isinstance(method, EndingTurns):
        yield
        return
    before, method.end_turn = method.end_turn, end_turn
    try:
        yield
    finally:
        method.end_turn = before


def each_callback(callbacks: Iterable[Callback], run: RunState, hook: str) -> Iterator[Callback]:
    """Yield each callback, and publish that this rank is in its ``hook``."""
    for callback in callbacks:
        run.enter(f"callback {callback.name!r}, {hook}")
        yield callback


def _gradient_norms(method: TrainableMethod, iteration: int) -> dict[str, Tensor]:
    """Compute the total L2 norm for each optimizer that steps in ``iteration``.

    On the device, and equal on all ranks.
    """
    norms = {}
    for key, optimizer in method.get_optimizers(iteration).items():
        gradients = [
            gradient
            for group in optimizer.param_groups
            for parameter in group["params"]
            if (gradient := parameter.grad) is not None
        ]
        if gradients:
            norms[f"grad_norm/{key}"] = total_norm(gradients)
    return norms


def _mean_by_name(micro_steps: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Take the mean of each value over the micro steps that have it; on the device."""
    if len(micro_steps) == 1:
        return dict(micro_steps[0])
    names = dict.fromkeys(name for values in micro_steps for name in values)
    return {
        name: torch.stack([values[name].float() for values in micro_steps if name in values]).mean()
        for name in names
    }
