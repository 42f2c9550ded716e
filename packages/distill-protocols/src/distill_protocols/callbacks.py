"""What watches a run: callbacks, trackers, the checkpointer. Hooks default to doing nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from attrs import Factory, define, field, frozen
from torch import Tensor

from distill_protocols.batch import BatchLoader
from distill_protocols.method import TrainableMethod
from distill_protocols.random import RandomStreams
from distill_protocols.ranks import RankGroup


class Tracker(Protocol):
    """Where numbers and clips go."""

    def log_scalars(self, iteration: int, values: Mapping[str, float]) -> None: ...
    def log_video(self, iteration: int, name: str, clips: Tensor, fps: float) -> None:
        """``clips`` [B, 3, F, H, W] in [0, 1]."""
        ...

    def log_text(self, iteration: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class ResumableTracker(Tracker, Protocol):
    """A tracker that can forget what a former process logged and this one will log again."""

    def resume(self, iteration: int) -> None:
        """Take back what was logged after ``iteration``, from which the run goes on (0: it starts
        afresh). Called once, before anything is logged."""
        ...


@frozen(kw_only=True)
class RunDescription:
    """What a run is, as trackers show it.

    Attributes:
        name: of the run, for people.
        run_file: text of its run file; empty: it has none.
        settings: every option, defaults included, as nested plain values.
    """

    name: str
    run_file: str = ""
    settings: Mapping[str, object] = field(factory=dict)


@runtime_checkable
class DescribedTracker(Tracker, Protocol):
    """A tracker that shows what a run is, beside its numbers."""

    def describe(self, description: RunDescription) -> None:
        """Take note of what the run is. Called once, after ``ResumableTracker.resume`` and before
        anything is logged."""
        ...


@runtime_checkable
class SummaryTracker(Tracker, Protocol):
    """A tracker that shows what came of a run, to be compared with others."""

    def log_summary(self, iteration: int, values: Mapping[str, float]) -> None:
        """Log the final numbers of a complete run, by the names of its metrics. Called once, after
        everything else."""
        ...


@frozen(eq=False, kw_only=True)
class StepRecord:
    """One finished iteration.

    Attributes:
        iteration: 1-based.
        losses: mean over the micro steps, detached, still on the device.
        metrics: 0-d outputs of the method and what callbacks added (gradient norms ...).
        outputs: the last micro step's outputs.
        stepped: keys of the optimizers that really stepped.
    """

    iteration: int
    losses: Mapping[str, Tensor]
    metrics: Mapping[str, Tensor | float]
    outputs: Mapping[str, Tensor]
    stepped: tuple[str, ...]


@define(eq=False, kw_only=True)
class RunState:
    """The run as a callback sees it. Callbacks read it, add metrics, and may ask for a stop."""

    method: TrainableMethod
    loader: BatchLoader
    streams: RandomStreams
    output_dir: Path
    max_train_steps: int
    trackers: tuple[Tracker, ...] = ()
    iteration: int = 0
    micro_steps: int = 0
    """Batches that went through finished iterations: the iterations, times the accumulation of
    each (a resumed run may accumulate otherwise)."""
    metrics: dict[str, Tensor | float] = field(factory=dict)
    """Of the iteration under way. ``StepRecord.metrics`` is this same mapping, so what a callback
    adds in ``on_step_end`` is seen by the callbacks after it."""
    carried: dict[str, Tensor | float] = field(factory=dict)
    """Metrics that came up after ``on_step_end``, as the time of a save: the trainer starts the
    metrics of the next iteration with them."""
    measure_losses: bool = False
    """A callback sets it in ``on_step_start`` to know, in this iteration, what each loss
    contributes to the gradients: ``loss_grad_norm/<role.module>/<loss>`` in ``metrics``, where the
    trainer can tell. It costs a backward pass for each loss of a module that several reach; the
    run trains the same."""
    global_batch_size: int = 1
    """Samples an iteration."""
    kept_until: set[int] = field(factory=set)
    """Iterations until each of which the newest checkpoint stays (``keep_checkpoint``)."""
    check_finite: Callable[[], None] = field(default=lambda: None)
    """Raises ``NonFiniteLossError`` if any loss so far was inf or nan, and ``RankError`` if one of
    another process was: all of them call it alike. Call it before the weights are saved or shown,
    because on an accelerator the trainer itself checks only at intervals."""

    ranks: RankGroup
    """The processes of the run. What only one shall do (files, trackers) is for
    ``ranks.is_first``; what asks the others must be done by all of them alike."""
    phase: str = "start of the run"
    """What this process does at present; errors name it."""
    enter: Callable[[str], None] = field(
        default=Factory(lambda run: partial(setattr, run, "phase"), takes_self=True)
    )
    """Sets ``phase`` (``run.enter("validation")``), and publishes it where there are several
    processes: the others name it in the error if they lose this one. The trainer enters each hook
    of a callback by itself; whatever takes long may enter more phases. Not from threads."""
    check_in_sync: Callable[[str], None] = field(default=lambda phase: None)
    """Enters a phase and waits until all processes are in it. Raises ``RankError`` on every process
    that arrives if one does not, or is in another phase."""
    report_progress: Callable[[str, int, int], None] = field(default=lambda what, done, total: None)
    """Shows whoever watches how much of a long piece of work within a hook is done:
    ``run.report_progress("validation", 3, 8)``, from (what, 0, total) to (what, total, total). Only
    rank 0's is shown; all ranks may call it, and nothing waits for the others."""

    @property
    def stop_reason(self) -> str | None:
        """Why the run is to stop (``method.stop``); None: it goes on."""
        return self.method.stop.reason

    def keep_checkpoint(self, iteration: int) -> None:
        """Ask that the newest checkpoint of ``iteration`` or before stays, whatever else decides
        which are deleted, until the number is taken out of ``kept_until``. All ranks ask alike, and
        again after a resume: it is no state of the run."""
        self.kept_until.add(iteration)

    def request_stop(self, reason: str) -> None:
        """Stop at the next safe point (``method.stop``). The first reason given is kept."""
        self.method.stop.request(reason)


class Callback:
    """Base of all callbacks. In the order of a run; within a hook, in the order of the list::

    on_train_start                     create state; a resume loads into it afterwards
      on_step_start                    before the first micro step
      on_before_optimizer_step         gradients are complete and true-sized
      on_step_end                      optimizers have stepped, gradients are gone
    on_exception                       instead of the rest, if something was raised
    on_train_end                       also after a requested stop

    A stop may come in the middle of an iteration, which is then rolled back: ``on_step_end`` never
    follows its ``on_step_start``, and ``RunState.iteration`` is again the one before. So what
    ``state_dict`` returns must not move before ``on_step_end``.

    A hook that takes long (sampling) calls ``run.method.stop.poll()`` on all ranks alike, and does
    not catch ``StopRequested``: the trainer continues with the next callback. Not in
    ``on_train_start``, which has no checkpoint to stop at.
    """

    name: str = "callback"
    """Key of its state in a checkpoint; unique in a run."""
    only_observes: ClassVar[bool] = False
    """Whether a run trains just the same without it, so that it may come and go between a
    checkpoint and the run that resumes it, and nobody has to say that this is meant."""

    def on_train_start(self, run: RunState) -> None: ...
    def on_step_start(self, run: RunState) -> None: ...
    def on_before_optimizer_step(self, run: RunState) -> None: ...
    def on_step_end(self, run: RunState, step: StepRecord) -> None: ...
    def on_exception(self, run: RunState, error: BaseException) -> None: ...
    def on_train_end(self, run: RunState) -> None: ...

    def state_dict(self) -> dict[str, object]:
        """Return tensors and JSON values that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None: ...


class Checkpointer(Protocol):
    """Saves and resumes a run. The trainer calls it when a save is safe; it decides."""

    def resume(self, run: RunState, callbacks: Mapping[str, Callback]) -> int:
        """Put everything back; returns the last finished iteration (0: start afresh)."""
        ...

    def after_step(self, run: RunState, callbacks: Mapping[str, Callback]) -> None:
        """Save if this iteration is one to save at."""
        ...

    def finish(self, run: RunState, callbacks: Mapping[str, Callback]) -> None:
        """Save the end, and wait for anything under way."""
        ...

    def on_exception(self, run: RunState, error: BaseException) -> None:
        """The run ends by ``error``: wait for anything under way. What it raises is added to it."""
        ...
