"""The trainer: what happens before, between and after iterations. It knows no method, no role and
no model family."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from attrs import frozen
from distill_protocols import (
    Callback,
    Checkpointer,
    CheckpointError,
    ContractError,
    DescribedTracker,
    RandomStreams,
    ResumableTracker,
    RunDescription,
    RunState,
    StopRequested,
    StorageError,
    SummaryTracker,
    Tracker,
    TrainableMethod,
)
from distill_runtime import Ranks

from distill_trainer.callbacks.metrics import MetricsCallback
from distill_trainer.callbacks.progress import ProgressCallback
from distill_trainer.config import TrainingConfig
from distill_trainer.distribution.strategy import Distribution
from distill_trainer.loop.batches import make_resumable
from distill_trainer.loop.iteration import IterationRunner, each_callback
from distill_trainer.loop.signals import stop_on_signals
from distill_trainer.monitoring.finite_guard import FiniteGuard
from distill_trainer.monitoring.rank_monitor import RankMonitor, monitor_ranks
from distill_trainer.trackers import build_trackers

CALLBACK_TIME = "time/callback/"
"""Before a callback's name: the seconds that its ``on_step_end`` took, of the iteration before."""


@frozen(kw_only=True)
class TrainResult:
    """How a run ended.

    Attributes:
        iteration: the last finished one.
        stop_reason: why it ended before ``max_train_steps``; None: it did not.
        updates: optimizer steps taken, by ``role.module``.
        resumed_from: the iteration that it continued after; 0: it started from the beginning.
    """

    iteration: int
    stop_reason: str | None
    updates: Mapping[str, int]
    resumed_from: int = 0


class DistillTrainer:
    """Trains any ``TrainableMethod`` on any iterable of batches.

    Args:
        training: how long, how much at once, what is written.
        callbacks: in this order within each hook; metrics and progress come after them.
        trackers: None builds those that ``training`` names. Of several ranks only rank 0 uses its
            own; the others close theirs unused.
        checkpointer: saves and resumes; None does neither.
        streams: the run's generators, for checkpoints; None takes the method's.
        distribution: the processes, and what each holds of the roles; None: the processes that
            torch.distributed has, each with all of what is not sharded, or this one alone.
        description: what the run is, for trackers that show it (``DescribedTracker``).
        again: names of callbacks. The run is complete, and of its end only what these do is done
            anew; nothing is trained. Empty: it is a run as any other.

    Raises:
        ContractError: two callbacks of one name: a checkpoint could not distinguish them.
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
        description: RunDescription | None = None,
        again: Collection[str] = (),
    ) -> None:
        self.training = training
        self.distribution = distribution
        self.checkpointer = checkpointer
        self._trackers = trackers
        self._streams = streams
        self._description = description
        self._again = frozenset(again)
        self._progress = ProgressCallback(training.log_every) if training.progress else None
        self._logged = MetricsCallback(training.log_every)
        self._always: list[Callback] = [self._logged]
        if self._progress is not None:
            self._always.append(self._progress)
        self.callbacks = _by_name([*callbacks, *self._always])

    def run(self, method: TrainableMethod, loader: Iterable[object]) -> TrainResult:
        """Train until ``max_train_steps``, or until a callback or a signal asks for a stop.

        A stop is seen between micro steps, wherever the method or a callback polls
        (``method.stop.poll()``), and after each iteration. An unfinished iteration is rolled back,
        so that the run ends, and is saved, exactly as it was before it.

        On several ranks (torch.distributed is initialised) all of them call this alike, each with
        micro batches of its own. A stop that one of them is asked for stops all at the same point,
        and one that fails ends all.

        Args:
            loader: micro batches of this rank; a ``BatchLoader`` can be resumed exactly, and a
                plain iterable is started again whenever it runs out.

        Raises:
            NonFiniteLossError: a loss became inf or nan, or a gradient where no fp16 scaling
                leaves its step out; nothing was saved since it did.
            DataError: the loader yields nothing, or is a ``BatchLoader`` that came to an end.
            StorageError: a file could not be written or read, by a tracker or a callback; saves
                that were under way are done.
            RankError: another rank failed, died, does not come, or is not where this one is.
            ContractError: the global batch does not divide over the ranks, or the streams are
                another rank's.
            RoleError: the strategy shards, and the roles are not sharded.
        """
        with self._open_distribution(method) as distribution:
            return self._run_on(distribution, method, loader)

    # -- inside -------------------------------------------------------------------------------

    def _open_distribution(self, method: TrainableMethod) -> AbstractContextManager[Distribution]:
        if self.distribution is not None:
            return contextlib.nullcontext(self.distribution)
        weights = [p for module in method.model_dict.values() for p in module.parameters()]
        return Distribution.adopt(self.training.distributed, weights)

    def _run_on(
        self, distribution: Distribution, method: TrainableMethod, loader: Iterable[object]
    ) -> TrainResult:
        training, ranks = self.training, distribution.ranks
        streams = self._streams or method.streams
        ranks.run_each(lambda: _check_streams(streams, ranks))
        output_dir = Path(training.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        self._folder = output_dir.stat()
        trackers = self._trackers
        if trackers is None:
            trackers = build_trackers(training.trackers, output_dir)
        guard = FiniteGuard(ranks=ranks)
        run = RunState(
            method=method,
            loader=make_resumable(loader),
            streams=streams,
            output_dir=output_dir,
            max_train_steps=training.max_train_steps,
            trackers=tuple(trackers) if ranks.is_first else (),
            global_batch_size=training.global_batch_size,
            check_finite=guard.check,
            ranks=ranks,
        )
        with (
            _closing(trackers),
            monitor_ranks(run, training.distributed.timeout_seconds) as monitor,
            self._reporting_errors(run),
            stop_on_signals(run),
            _naming_storage(run),
            # Innermost, so that callbacks see the error that names the rank at fault.
            monitor.fail_together() if monitor else contextlib.nullcontext(),
        ):
            return self._train(run, guard, distribution, monitor)

    def _train(
        self,
        run: RunState,
        guard: FiniteGuard,
        distribution: Distribution,
        monitor: RankMonitor | None,
    ) -> TrainResult:
        callbacks = tuple(self.callbacks.values())
        # First of all, because it makes the weights of all ranks equal: averages begin with those.
        distribution.prepare(run.method)
        accumulation = self._accumulation(run.ranks.size)
        for callback in each_callback(callbacks, run, "on_train_start"):
            callback.on_train_start(run)
        # After on_train_start: a resume loads into what callbacks create there (averages ...).
        run.enter("resume")
        resumed_from = self.checkpointer.resume(run, self.callbacks) if self.checkpointer else 0
        run.iteration = resumed_from
        if self._again and resumed_from < run.max_train_steps:
            raise CheckpointError(
                f"the newest intact checkpoint is of iteration {resumed_from:,} of "
                f"{run.max_train_steps:,}, so the end of the run is not there to be made anew "
                "without training. Train to the end first."
            )
        for tracker in run.trackers:
            if isinstance(tracker, ResumableTracker):
                tracker.resume(resumed_from)
            if self._description is not None and isinstance(tracker, DescribedTracker):
                tracker.describe(self._description)
        iterations = IterationRunner(run, callbacks, guard, distribution, accumulation)
        run.enter("start of training")
        # The stop is asked for first: after the last iteration too, all ranks must ask or none.
        while not run.method.stop.requested() and run.iteration < run.max_train_steps:
            self._iterate(run, guard, iterations)
        if self._progress is not None:
            self._progress.close()  # before callbacks of the end print tables
        run.enter("save of the end")
        guard.check()
        self._refuse_other_folder(run)
        if self.checkpointer:
            self.checkpointer.finish(run, self.callbacks)
        run.metrics = {}  # what callbacks add now are numbers of the end
        last = [c for c in callbacks if not self._again or c.name in self._again]
        for callback in each_callback(last, run, "on_train_end"):
            try:
                callback.on_train_end(run)
            except StopRequested as stop:  # the others still have to close what they opened
                run.request_stop(str(stop))
        if run.stop_reason is None and not self._again:
            self._log_summary(run)
        # After the callbacks: in their last hook (validation, export) ranks still work together.
        if monitor:
            monitor.finish()
        return TrainResult(
            iteration=run.iteration,
            stop_reason=run.stop_reason,
            updates=run.method.update_counts,
            resumed_from=resumed_from,
        )

    def _log_summary(self, run: RunState) -> None:
        """Give the newest means, and what was measured at the end, to trackers that show them."""
        of_the_end = {name: v for name, v in run.metrics.items() if isinstance(v, float)}
        values = self._logged.newest | of_the_end
        for tracker in run.trackers:
            if values and isinstance(tracker, SummaryTracker):
                tracker.log_summary(run.iteration, values)

    def _accumulation(self, ranks: int) -> int:
        try:
            return self.training.accumulation(ranks)
        except ValueError as error:
            raise ContractError(f"training: {error}") from None

    def _iterate(self, run: RunState, guard: FiniteGuard, iterations: IterationRunner) -> None:
        # A method of its own, so that the record's outputs are freed before the next forward call.
        record = iterations.run_next()
        if record is None:
            return
        if run.iteration % self.training.log_every == 0:
            guard.check()
            self._refuse_other_folder(run)
        for callback in each_callback(self.callbacks.values(), run, "on_step_end"):
            began = time.perf_counter()
            try:
                callback.on_step_end(run, record)
            except StopRequested as stop:  # it leaves its own work only: the step is done
                run.request_stop(str(stop))
            if callback not in self._always:  # those wait for the device, which is training
                seconds = time.perf_counter() - began
                run.carried[f"{CALLBACK_TIME}{callback.name}"] = seconds
        run.enter("save")
        if self.checkpointer:
            self.checkpointer.after_step(run, self.callbacks)
        run.enter("end of the iteration")

    def _refuse_other_folder(self, run: RunState) -> None:
        # Writers make the folders that they need, so the rest of a run would lie in a new one,
        # without its beginning and without its claim.
        try:
            same = os.path.samestat(run.output_dir.stat(), self._folder)
        except FileNotFoundError:
            same = False
        if not same and run.ranks.is_first:
            raise OSError(errno.ENOENT, "deleted or replaced by another", str(run.output_dir))

    @contextlib.contextmanager
    def _reporting_errors(self, run: RunState) -> Iterator[None]:
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


def _check_streams(streams: RandomStreams, ranks: Ranks) -> None:
    if (streams.rank, streams.world_size) != (ranks.rank, ranks.size):
        raise ContractError(
            f"the run's RandomStreams are those of rank {streams.rank} of {streams.world_size}, "
            f"but this is rank {ranks.rank} of {ranks.size}; they must be its own, or samples of "
            "several ranks would get the same noise. Make them with RandomStreams(seed, "
            f"rank={ranks.rank}, world_size={ranks.size}) and give them to the method."
        )


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
def _closing(trackers: Sequence[Tracker]) -> Iterator[None]:
    """Close all ``trackers`` at the end, also where one of them fails."""
    try:
        yield
    except BaseException as error:
        for failure in _close_all(trackers):
            # The first error is the one to mend: the second must not hide it.
            error.add_note(f"a tracker could not be closed either: {failure}")
        raise
    failures = _close_all(trackers)
    if failures:
        raise _storage_error(
            "all iterations are done, closing the trackers", failures[0]
        ) from failures[0]


def _close_all(trackers: Sequence[Tracker]) -> list[OSError]:
    failures = []
    for tracker in trackers:
        try:
            tracker.close()
        except OSError as error:
            failures.append(error)
    return failures


@contextlib.contextmanager
def _naming_storage(run: RunState) -> Iterator[None]:
    """Turn an OSError of whatever writes or reads files into a StorageError with the phase."""
    try:
        yield
    except OSError as error:
        raise _storage_error(f"iteration {run.iteration}, {run.phase}", error) from error


def _storage_error(place: str, error: OSError) -> StorageError:
    return StorageError(
        f"{place}: {error}. What a run writes must reach the disk, or its record has holes. Make "
        "room or mend the folder and start the same command again: saved checkpoints are whole."
    )
