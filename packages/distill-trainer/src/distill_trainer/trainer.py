"""The loop. It knows no method, no role and no family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from distill_protocols import (
    Callback,
    Checkpointer,
    ContractError,
    DataError,
    RandomStreams,
    RunState,
    StepRecord,
    StepResult,
    StopRequested,
    Tracker,
    TrainableMethod,
)
from distill_runtime import Ranks
from torch import Tensor

from distill_trainer.batches import endless
from distill_trainer.callbacks.metrics import MetricsCallback
from distill_trainer.callbacks.progress import ProgressCallback
from distill_trainer.config import TrainingConfig
from distill_trainer.distribution import Distribution, TrainStep
from distill_trainer.finite import FiniteGuard
from distill_trainer.lockstep import Lockstep, in_step
from distill_trainer.rewind import Rewind
from distill_trainer.shards import total_norm, whole
from distill_trainer.signals import stop_on_signals
from distill_trainer.timing import TimedIterator
from distill_trainer.trackers import build_trackers


@frozen(kw_only=True)
class TrainResult:
    """How a run ended.

    Attributes:
        iteration: the last finished one.
        stop_reason: why it ended before ``max_train_steps``; None: it did not.
        updates: optimizer steps taken, by ``role.module``.
        resumed_from: the iteration that it continued after; 0: it started afresh.
    """

    iteration: int
    stop_reason: str | None
    updates: Mapping[str, int]
    resumed_from: int = 0


class DistillTrainer:
    """Trains any ``DistillMethod`` on any iterable of batches.

    Args:
        training: how long, how much at once, what is written.
        callbacks: in this order within each hook; metrics and progress come after them.
        trackers: None builds those that ``training`` names. Of several ranks only rank 0 uses its
            own; the others close theirs unused.
        checkpointer: saves and resumes; None does neither.
        streams: the run's generators, for checkpoints; None takes the method's.
        distribution: the processes, and what each holds of the roles; None: those that
            torch.distributed has, with what is not sharded whole on each of them, or this one.

    Raises:
        ContractError: two callbacks of one name: a checkpoint could not tell them apart.
    """

    def __init__(
        self,
        training: TrainingConfig,
        *,
        callbacks: Sequence[Callback] = (),
        trackers: Sequence[Tracker] | None = None,
        checkpointer: Checkpointer | None = None,
        streams: RandomStreams | None = None,
        distribution: Distribution | None = None,
    ) -> None:
        self.training = training
        self.distribution = distribution
        self.checkpointer = checkpointer
        self._trackers = trackers
        self._streams = streams
        always: list[Callback] = [MetricsCallback(training.log_every)]
        if training.progress:
            always.append(ProgressCallback(training.log_every))
        self.callbacks = _by_name([*callbacks, *always])

    def run(self, method: TrainableMethod, loader: Iterable[Any]) -> TrainResult:
        """Train until ``max_train_steps``, or until a callback or a signal asks for a stop.

        A stop is seen between micro steps, wherever the method or a callback polls
        (``method.stop.poll()``), and after each iteration. An iteration that it finds unfinished
        is taken back, so that the run ends, and is saved, exactly as it was before it. On several
        ranks (torch.distributed is initialised) one that is asked stops all at the same point, and
        one that fails ends all.

        On several ranks, all of them run alike, each on micro batches of its own.

        Args:
            loader: micro batches of this rank; a ``BatchLoader`` can be resumed exactly, and a
                plain iterable is started again whenever it runs out.

        Raises:
            NonFiniteLossError: a loss became inf or nan, or a gradient where no fp16 scaling
                leaves its step out; nothing was saved since it did.
            DataError: the loader yields nothing, or is a ``BatchLoader`` that came to an end.
            RankError: another rank failed, died, does not come, or is not where this one is.
            ContractError: the global batch does not divide over the ranks, the streams are
                another rank's, or the strategy shards and the roles are not sharded.
        """
        with self._distribution(method) as distribution:
            return self._run_on(distribution, method, loader)

    # -- inside -------------------------------------------------------------------------------

    def _distribution(self, method: TrainableMethod) -> AbstractContextManager[Distribution]:
        if self.distribution is not None:
            return contextlib.nullcontext(self.distribution)
        weights = [p for module in method.model_dict.values() for p in module.parameters()]
        return Distribution.found(self.training.distributed, weights)

    def _run_on(
        self, distribution: Distribution, method: TrainableMethod, loader: Iterable[Any]
    ) -> TrainResult:
        training, ranks = self.training, distribution.ranks
        streams = self._streams or method.streams
        ranks.run_each(lambda: _check_place(streams, ranks))
        output_dir = Path(training.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        trackers = self._trackers
        if trackers is None:
            trackers = build_trackers(training.trackers, output_dir)
        guard = FiniteGuard(ranks=distribution.ranks)
        run = RunState(
            method=method,
            loader=endless(loader),
            streams=streams,
            output_dir=output_dir,
            max_train_steps=training.max_train_steps,
            trackers=tuple(trackers) if distribution.ranks.is_first else (),
            global_batch_size=training.global_batch_size,
            check_finite=guard.check,
            ranks=distribution.ranks,
        )
        with (
            _closing(trackers),
            in_step(run, training.distributed.timeout_seconds) as lockstep,
            self._reporting(run),
            stop_on_signals(run),
            lockstep.failing_as_one() if lockstep else contextlib.nullcontext(),
        ):
            return self._run(run, guard, distribution, lockstep)

    def _run(
        self,
        run: RunState,
        guard: FiniteGuard,
        distribution: Distribution,
        lockstep: Lockstep | None,
    ) -> TrainResult:
        callbacks = tuple(self.callbacks.values())
        # First of all: it makes the weights of all ranks alike, and averages begin with those.
        train_step = distribution.train_step(run.method)
        accumulation = self._accumulation(run.ranks.size)
        for callback in _each(callbacks, run, "on_train_start"):
            callback.on_train_start(run)
        # After on_train_start: what a callback creates there (averages ...) is loaded into.
        run.enter("resume")
        resumed_from = self.checkpointer.resume(run, self.callbacks) if self.checkpointer else 0
        run.iteration = resumed_from
        loop = _Loop(run, callbacks, guard, distribution, train_step, accumulation)
        run.enter("start of training")
        # The stop first: after the last iteration too, all ranks must know of it or none.
        while not run.method.stop.requested() and run.iteration < run.max_train_steps:
            self._iteration(run, guard, loop)
        run.enter("save of the end")
        guard.check()
        if self.checkpointer:
            self.checkpointer.finish(run, self.callbacks)
        for callback in _each(callbacks, run, "on_train_end"):
            with _one_called_off(run):  # the others still have to close what they opened
                callback.on_train_end(run)
        # After the callbacks: what they do last (looks, exports) is done by all ranks together.
        if lockstep:
            lockstep.ending()
        return TrainResult(
            iteration=run.iteration,
            stop_reason=run.stop_reason,
            updates=run.method.update_counts,
            resumed_from=resumed_from,
        )

    def _accumulation(self, ranks: int) -> int:
        try:
            return self.training.accumulation(ranks)
        except ValueError as error:
            raise ContractError(f"training: {error}") from None

    def _iteration(self, run: RunState, guard: FiniteGuard, loop: _Loop) -> None:
        # A function of its own, so that the record's outputs are gone before the next forward.
        record = loop.step()
        if record is None:
            return
        if run.iteration % self.training.log_every == 0:
            guard.check()
        for callback in _each(self.callbacks.values(), run, "on_step_end"):
            with _one_called_off(run):  # its own work only: the step is done
                callback.on_step_end(run, record)
        run.enter("save")
        if self.checkpointer:
            self.checkpointer.after_step(run, self.callbacks)
        run.enter("end of the iteration")

    @contextlib.contextmanager
    def _reporting(self, run: RunState) -> Iterator[None]:
        try:
            yield
        # BaseException: torch's CheckpointException and KeyboardInterrupt are no Exceptions.
        except BaseException as error:
            for name, callback in self.callbacks.items():
                try:
                    callback.on_exception(run, error)
                except Exception as second:
                    # The first error is the one to mend: the second must not hide it.
                    error.add_note(f"callback {name!r} failed in on_exception too: {second!r}")
            if self.checkpointer:
                try:
                    self.checkpointer.on_exception(run, error)
                except Exception as second:
                    error.add_note(f"a save under way failed too: {second}")
            raise


class _Loop:
    """One iteration: micro steps, one optimizer step, its record."""

    def __init__(
        self,
        run: RunState,
        callbacks: tuple[Callback, ...],
        guard: FiniteGuard,
        distribution: Distribution,
        train_step: TrainStep,
        accumulation: int,
    ) -> None:
        self._run = run
        self._callbacks = callbacks
        self._guard = guard
        self._distribution = distribution
        self._train_step = train_step
        self._accumulation = accumulation
        self._batches = TimedIterator(iter(run.loader))
        self._start = Rewind(run)

    def step(self) -> StepRecord | None:
        """The next iteration, or None if a stop came before its optimizers stepped: then it is
        taken back, and never was."""
        run, method = self._run, self._run.method
        self._start.mark()
        run.iteration += 1
        run.metrics, run.carried = run.carried, {}
        try:
            losses, outputs = self._gradients()
        except StopRequested as stop:
            run.request_stop(str(stop))
            self._guard.forget(run.iteration)
            self._distribution.drop_gradients(method)
            self._start.back()
            return None
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

    def _gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All micro steps, up to gradients that are ready to step: (mean losses, last outputs)."""
        run, method, iteration = self._run, self._run.method, self._run.iteration
        for callback in _each(self._callbacks, run, "on_step_start"):
            callback.on_step_start(run)
        losses: list[dict[str, Tensor]] = []
        metrics: list[dict[str, Tensor]] = []
        ids: list[str] = []
        outputs: dict[str, Tensor] = {}
        for micro_step in range(self._accumulation):
            if micro_step:
                method.stop.poll()  # before the first, the loop itself has just asked
            outputs = {}  # those of the micro step before: clips, which need not be held on
            of = f"of micro step {micro_step + 1} of {self._accumulation}"
            run.enter(f"data {of}")
            batch = self._next_batch()
            ids += method.batch_ids(batch)
            run.enter(f"forward and backward {of}")
            with self._distribution.micro_step(method, last=micro_step + 1 == self._accumulation):
                found, outputs = self._micro_step(batch)
            losses.append(found)
            metrics.append(_scalars(outputs))
        run.metrics |= _mean(metrics)
        run.metrics["time/data"] = self._batches.take_seconds()
        run.enter("gradients")
        method.unscale_gradients(iteration)
        norms = _gradient_norms(method, iteration)
        run.metrics |= norms
        # Under fp16 scaling such gradients are common, and the scaler leaves their step out.
        watched = {} if method.grad_scaler.is_enabled() else norms
        self._guard.watch_gradients(iteration, watched, ids)
        for callback in _each(self._callbacks, run, "on_before_optimizer_step"):
            callback.on_before_optimizer_step(run)
        return _mean(losses), outputs

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

    def _micro_step(self, batch: Any) -> StepResult:
        method, iteration = self._run.method, self._run.iteration
        with method.autocast():
            loss_map, outputs = self._train_step(batch, iteration)
        if "total_loss" not in loss_map:
            raise ContractError(
                f"{type(method).__name__}.single_train_step returned the losses "
                f"{sorted(loss_map)}; it must return 'total_loss', because that is what is "
                "differentiated. Add loss_map['total_loss']."
            )
        losses = {name: whole(loss.detach()) for name, loss in loss_map.items()}
        self._guard.watch(iteration, losses, method.batch_ids(batch))
        loss = loss_map["total_loss"]
        if self._accumulation > 1:
            loss = loss / self._accumulation
        method.grad_scaler.scale(loss).backward()
        return StepResult(losses, outputs)


def _check_place(streams: RandomStreams, ranks: Ranks) -> None:
    if (streams.rank, streams.world_size) != (ranks.rank, ranks.size):
        raise ContractError(
            f"the run's RandomStreams are those of rank {streams.rank} of {streams.world_size}, "
            f"but this is rank {ranks.rank} of {ranks.size}; they must be its own, or samples of "
            "several ranks would get the same noise. Make them with RandomStreams(seed, "
            f"rank={ranks.rank}, world_size={ranks.size}) and give them to the method."
        )


def _gradient_norms(method: TrainableMethod, iteration: int) -> dict[str, Tensor]:
    """Total L2 norm by optimizer that steps in ``iteration``, on the device, alike on all ranks."""
    norms = {}
    for key, optimizer in method.get_optimizers(iteration).items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            norms[f"grad_norm/{key}"] = total_norm(gradients)
    return norms


def _scalars(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(value) for name, value in outputs.items() if value.ndim == 0}


def _mean(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """By name, over the micro steps that have it; on the device."""
    if len(parts) == 1:
        return dict(parts[0])
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: torch.stack([part[name].float() for part in parts if name in part]).mean()
        for name in names
    }


def _each(callbacks: Iterable[Callback], run: RunState, hook: str) -> Iterator[Callback]:
    for callback in callbacks:
        run.enter(f"callback {callback.name!r}, {hook}")
        yield callback


def _by_name(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    names = [callback.name for callback in callbacks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ContractError(
            f"two callbacks are called {', '.join(map(repr, twice))}; each name must occur once, "
            "because a checkpoint keeps their state under it. Give one of them another `name`."
        )
    return dict(zip(names, callbacks, strict=True))


@contextlib.contextmanager
def _one_called_off(run: RunState) -> Iterator[None]:
    try:
        yield
    except StopRequested as stop:
        # Known already, unless it was raised by hand.
        run.request_stop(str(stop))


@contextlib.contextmanager
def _closing(trackers: Sequence[Tracker]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for tracker in trackers:
            stack.callback(tracker.close)
        yield
