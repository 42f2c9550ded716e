"""A stop as the trainer's callbacks see it: what ran, what was written, what is put back."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_protocols import Callback, Condition, NonFiniteLossError, RunState, StopRequested
from distill_trainer import (
    DistillTrainer,
    EmaCallback,
    EmaConfig,
    FiniteGuard,
    ProfilerCallback,
    ProfilerConfig,
    StepTimerCallback,
    StepTimerConfig,
    ValidationCallback,
    ValidationConfig,
    ViewConfig,
)
from distill_trainer.callbacks.progress import ProgressCallback
from toy_trainer import (
    Alternating,
    MemoryCheckpointer,
    MemoryTracker,
    Recorder,
    alternating,
    batches,
    training,
)


class Stopped(Alternating):
    """Does ``event`` in the given micro step (from 1, over the whole run)."""

    event: Callable[[Any], None] = staticmethod(lambda method: method.stop.request("enough"))

    def __init__(self, at: int) -> None:
        super().__init__(alternating().bundle, 2)
        self.at = at
        self.micro_steps = 0

    def single_train_step(self, batch: Any, iteration: int) -> Any:
        self.micro_steps += 1
        if self.micro_steps == self.at:
            self.event(self)
        return super().single_train_step(batch, iteration)


def run(method: Alternating, folder: Path, steps: int = 5, *, micro: int = 3, **parts: Any) -> Any:
    config = training(folder, steps, global_batch_size=2 * micro, batch_size_per_device=2)
    return DistillTrainer(config, **parts).run(method, batches())


def test_an_iteration_stopped_in_the_middle_is_rolled_back(tmp_path: Path) -> None:
    method, tracker, saved = Stopped(at=8), MemoryTracker(), MemoryCheckpointer()
    recorder, stream = Recorder(), io.StringIO()
    bar = ProgressCallback(1, stream, seconds_between_lines=0)
    timer = StepTimerCallback(StepTimerConfig())
    result = run(
        method, tmp_path, callbacks=[recorder, bar, timer], trackers=[tracker],
        checkpointer=saved,
    )  # fmt: skip
    assert (result.iteration, result.stop_reason) == (2, "enough")
    assert result.updates == {"student.net": 1, "critic.net": 1}
    assert method.micro_steps == 8, "the third of them is not waited for"
    assert recorder.calls[-2:] == ["recorder.step_start", "recorder.train_end"]
    assert [record.iteration for record in recorder.records] == [1, 2]
    assert saved.saved == [1, 2]
    assert tracker.scalars == [], "what is stopped between two log points is logged when it goes on"
    lines = stream.getvalue().splitlines()
    assert [line.split(" ")[0] for line in lines] == ["1/5", "2/5"]


@pytest.mark.parametrize(("at", "last"), [(4, 1), (5, 1), (6, 2)])
def test_it_stops_between_micro_steps(tmp_path: Path, at: int, last: int) -> None:
    """After the last one the gradients are whole: the iteration is finished."""
    assert run(Stopped(at), tmp_path).iteration == last


@pytest.mark.parametrize("at", [1, 4])
def test_a_stop_that_a_method_raises_by_hand_is_one_too(tmp_path: Path, at: int) -> None:
    method = Stopped(at)

    def give_up(_: Any) -> None:
        raise StopRequested("the reward is out of bounds")

    method.event = give_up
    result = run(method, tmp_path)
    assert (result.iteration, result.stop_reason) == (at // 3, "the reward is out of bounds")


def test_each_run_has_its_own_stop_flag(tmp_path: Path) -> None:
    method = Stopped(at=1)
    before = method.stop
    assert run(method, tmp_path).stop_reason == "enough"
    assert method.stop is before
    assert method.stop.reason is None, "sampling after the run is not refused"
    assert run(method, tmp_path).stop_reason is None


class Asks(Callback):
    """Asks for a stop in one hook and polls there, as a long validation would."""

    name = "asks"

    def __init__(self, hook: str) -> None:
        self.hook = hook

    def _ask(self, hook: str, run: RunState) -> None:
        if hook == self.hook and run.iteration == 2:
            run.request_stop("asked to")
            run.method.stop.poll()

    def on_step_start(self, run: RunState) -> None:
        self._ask("step_start", run)

    def on_before_optimizer_step(self, run: RunState) -> None:
        self._ask("before_optimizer_step", run)

    def on_step_end(self, run: RunState, step: Any) -> None:
        self._ask("step_end", run)

    def on_train_end(self, run: RunState) -> None:
        self._ask("train_end", run)


@pytest.mark.parametrize(
    ("hook", "steps", "last"),
    [
        ("step_start", 5, 1),
        ("before_optimizer_step", 5, 1),
        ("step_end", 5, 2),
        ("train_end", 2, 2),
    ],
)
def test_a_callback_may_poll(tmp_path: Path, hook: str, steps: int, last: int) -> None:
    recorder, saved = Recorder(), MemoryCheckpointer()
    result = run(
        alternating(), tmp_path, steps, callbacks=[Asks(hook), recorder], checkpointer=saved
    )
    assert (result.iteration, result.stop_reason) == (last, "asked to")
    assert [record.iteration for record in recorder.records] == list(range(1, last + 1))
    assert recorder.calls[-1] == "recorder.train_end", "the callbacks after it are called"
    assert saved.saved == list(range(1, last + 1))


class Looking(Stopped):
    """A stop is asked for in the n-th view that it samples; it polls there, or does not."""

    looks = 0
    polls = True

    def sample_for_logging(
        self, views: Any, cond: Any, *, seed: int, rows: Any = None
    ) -> dict[str, Any]:
        clips = {}
        for view in views:
            self.looks += 1
            role = self.bundle[view.role]
            with role.frozen(), role.averaged(ema=view.ema):
                if self.looks == self.at:
                    self.stop.request("enough")
                    if self.polls:
                        self.stop.poll()
                clips[view.name] = torch.zeros(1, 3, 1, 2, 2)
        return clips


class _Prompts:
    def encode(self, prompts: Any, images: Any = None) -> Condition:
        return Condition({"text": torch.zeros(len(prompts), 1)})


@pytest.mark.parametrize(("at", "polls"), [(3, True), (4, True), (3, False)])
def test_a_stopped_validation_leaves_no_files(tmp_path: Path, at: int, polls: bool) -> None:
    method, tracker = Looking(at), MemoryTracker()
    method.polls = polls
    method.event = lambda _: None
    views = {
        "ema": ViewConfig(role="student", ema=True),
        "live": ViewConfig(role="student"),
    }
    config = ValidationConfig(every_steps=2, prompts=("a",), views=views)
    recorder = Recorder()
    ema = EmaCallback(EmaConfig(roles=("student",), decay=0.5))
    callbacks = [ema, ValidationCallback(config, _Prompts()), recorder]  # type: ignore[arg-type]
    result = run(method, tmp_path, 9, callbacks=callbacks, trackers=[tracker])
    assert (result.iteration, method.looks) == (4, at)
    assert len(recorder.records) == 4
    assert {iteration for iteration, _, _ in tracker.videos} == {2}
    written = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert written == ["iteration-000002", "over_time"]

    undisturbed = Looking(0)
    undisturbed.event = method.event
    run(undisturbed, tmp_path / "other", 4, callbacks=[EmaCallback(ema.config)])
    for key, module in undisturbed.model_dict.items():
        own = method.model_dict[key]
        assert own.training
        assert all(p.requires_grad for p in own.parameters())
        for a, b in zip(module.parameters(), own.parameters(), strict=True):
            assert torch.equal(a, b), "its own weights are back, not the average's"


@pytest.mark.parametrize(("at", "traces"), [(4, []), (7, ["trace-000002-000002.json"])])
def test_a_trace_holds_a_whole_iteration_or_is_not_written(
    tmp_path: Path, at: int, traces: list[str]
) -> None:
    callbacks = [ProfilerCallback(ProfilerConfig(start=2, steps=5))]
    run(Stopped(at), tmp_path, callbacks=callbacks)
    assert [path.name for path in tmp_path.glob("profile/*")] == traces


def test_a_loss_of_a_rolled_back_iteration_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poisoned(Stopped):
        def single_train_step(self, batch: Any, iteration: int) -> Any:
            result = super().single_train_step(batch, iteration)
            factor = math.nan if self.micro_steps == self.at else 1.0
            return result._replace(
                loss_map={name: loss * factor for name, loss in result.loss_map.items()}
            )

    # As on an accelerator, where losses are looked at later.
    monkeypatch.setattr(
        "distill_trainer.loop.trainer.FiniteGuard", lambda **ranks: FiniteGuard(True, **ranks)
    )
    assert run(Poisoned(at=5), tmp_path).iteration == 1
    with pytest.raises(NonFiniteLossError):
        run(Poisoned(at=6), tmp_path)


def test_only_losses_of_the_stopped_iteration_are_forgotten() -> None:
    guard = FiniteGuard(defer=True)
    nan = {"total_loss": torch.tensor(float("nan"))}
    guard.watch(3, nan, [])
    guard.forget(3)
    guard.check()
    guard.watch(2, nan, [])
    guard.forget(3)
    with pytest.raises(NonFiniteLossError):
        guard.check()
