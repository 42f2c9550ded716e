"""Clipping, validation, progress, dumps: what each leaves behind, and what it leaves alone."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distill_protocols import (
    Callback,
    NonFiniteLossError,
    RoleError,
    RunState,
    StepRecord,
)
from distill_runtime import load_plugin, plugin_names
from distill_trainer import (
    DebugDumpCallback,
    DebugDumpConfig,
    DistillTrainer,
    EmaCallback,
    EmaConfig,
    GradClipCallback,
    GradClipConfig,
    ParamCountCallback,
    ProfilerCallback,
    ProfilerConfig,
    ProgressCallback,
    StepTimerCallback,
    StepTimerConfig,
)
from distill_trainer.callbacks import metrics
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from toy_trainer import (
    MemoryTracker,
    Recorder,
    alternating,
    batches,
    training,
)


class _Gradients(Recorder):
    """Keeps the gradients that the optimizers will see."""

    def __init__(self) -> None:
        super().__init__("gradients")
        self.kept: list[dict[str, list[Tensor]]] = []

    def on_before_optimizer_step(self, run) -> None:  # type: ignore[no-untyped-def]
        self.kept.append(
            {
                key: [p.grad.clone() for p in module.parameters() if p.grad is not None]
                for key, module in run.method.model_dict.items()
            }
        )


@given(max_norm=st.floats(1e-3, 10), seed=st.integers(0, 100))
def test_clipping_is_torchs_own_and_reports_the_norm_before_it(
    tmp_path_factory: pytest.TempPathFactory, max_norm: float, seed: int
) -> None:
    data = batches(1, seed=seed)
    seen: list[dict[str, list[Tensor]]] = []
    recorder = Recorder()
    for clip in (None, max_norm):
        gradients = _Gradients()
        callbacks = [GradClipCallback(GradClipConfig(max_norm=clip)), gradients, recorder]
        config = training(tmp_path_factory.mktemp("run"), 1)
        DistillTrainer(config, callbacks=callbacks).run(alternating(1), data)
        seen += gradients.kept
    raw = [torch.nn.Parameter(g) for g in seen[0]["student.net"]]
    for parameter in raw:
        parameter.grad = parameter.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(raw, max_norm)
    for record in recorder.records:
        assert float(record.metrics["grad_norm/student.net"]) == pytest.approx(float(norm))
        assert "grad_norm/critic.net" not in record.metrics
    for parameter, clipped in zip(raw, seen[1]["student.net"], strict=True):
        torch.testing.assert_close(parameter.grad, clipped)


def test_under_fp16_gradients_are_true_sized_before_they_are_clipped(tmp_path: Path) -> None:
    norms = []
    for precision in ("fp32", "fp16"):
        method, recorder = alternating(1, precision=precision), Recorder()
        if method.grad_scaler.is_enabled():
            state = method.state_dict()
            state["grad_scaler"]["scale"] = 64.0  # the usual 2 ** 14 would overflow here
            method.load_state_dict(state)
        callbacks = [GradClipCallback(GradClipConfig()), recorder]
        DistillTrainer(training(tmp_path, 1), callbacks=callbacks).run(method, batches(1))
        norms.append(float(recorder.records[0].metrics["grad_norm/student.net"]))
    assert norms[0] == pytest.approx(norms[1], rel=0.01)


@pytest.mark.parametrize("roles", [("teacher",), ("nobody",)])
def test_an_average_of_a_frozen_or_absent_role_is_refused(
    tmp_path: Path, roles: tuple[str, ...]
) -> None:
    method = alternating()
    method.bundle.roles["teacher"] = type(method.bundle["student"])(
        name="teacher", modules={"net": torch.nn.Linear(3, 3)}
    )
    trainer = DistillTrainer(training(tmp_path, 1), callbacks=[EmaCallback(EmaConfig(roles=roles))])
    with pytest.raises(RoleError, match=roles[0]):
        trainer.run(method, batches())


def test_metrics_are_means_and_both_turns_are_seen(tmp_path: Path) -> None:
    method, tracker, recorder = alternating(5), MemoryTracker(), Recorder()
    DistillTrainer(
        training(tmp_path, 12, log_every=10), callbacks=[recorder], trackers=[tracker]
    ).run(method, batches())
    assert [iteration for iteration, _ in tracker.scalars] == [10, 12]
    first = tracker.scalars[0][1]
    critic = [r.losses["critic_loss"].item() for r in recorder.records[:10] if r.iteration % 5]
    assert len(critic) == 8
    assert first["loss/critic_loss"] == pytest.approx(sum(critic) / 8)
    assert first["loss/student_loss"] > 0
    assert (first["updates/student.net"], first["updates/critic.net"]) == (2, 8)
    assert first["lr/student.net"] == 0.01
    assert "size" in first
    assert "loss/student_loss" not in tracker.scalars[1][1], "11 and 12 were the critic's"


def _progress(tmp_path: Path, stream: io.StringIO, **changes: float) -> str:
    bar = ProgressCallback(2, stream, seconds_between_lines=0, **changes)
    DistillTrainer(training(tmp_path, 5), callbacks=[bar]).run(alternating(2), batches())
    return stream.getvalue()


def test_progress_is_plain_lines_without_a_terminal(tmp_path: Path) -> None:
    text = _progress(tmp_path, io.StringIO())
    lines = text.splitlines()
    assert "\r" not in text
    assert "\x1b" not in text
    assert [line.split(" ")[0] for line in lines] == ["2/5", "4/5", "5/5"]
    for line in lines:
        assert "student_loss" in line
        assert "critic_loss" in line
        assert "it/s" in line
        assert "left" in line


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    last = _progress(tmp_path, Terminal()).split("\r")[-1]
    assert "5/5" in last
    assert "student_loss" in last


class _Works(Callback):
    """Does long work in a hook, and logs within it."""

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        for done in range(3):
            run.report_progress("looking", done, 2)
        logging.getLogger("distill_trainer").warning("look at %d", step.iteration)

    def on_train_end(self, run: RunState) -> None:
        for done in range(3):
            run.report_progress("last look", done, 2)
        print("a table")


def test_work_within_a_hook_is_shown_and_log_lines_stay_off_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(screen)
    logging.getLogger().addHandler(handler)
    try:
        bar = training(tmp_path, 3, progress=True)
        DistillTrainer(bar, callbacks=[_Works()]).run(alternating(2), batches())
    finally:
        logging.getLogger().removeHandler(handler)
    # What a person sees: a carriage return begins a line anew.
    text = screen.getvalue()
    lines = [line.split("\r")[-1] for line in text.split("\n")]
    assert [line for line in lines if "look at" in line] == [f"look at {n}" for n in (1, 2, 3)]
    assert "a table" in lines
    assert "looking 1/2" in text
    assert "last look" in text
    assert not any("last look" in line for line in lines), "it leaves no trace"


def test_work_within_a_hook_is_lines_without_a_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    bar = ProgressCallback(2, stream, seconds_between_work_lines=0)
    DistillTrainer(training(tmp_path, 1), callbacks=[_Works(), bar]).run(alternating(2), batches())
    assert "looking: 1/2\nlooking: 2/2\n" in stream.getvalue()
    # What was shown to be under way is shown to be done, however soon that is.
    bar.seconds_between_work_lines = 3600
    run_state = SimpleNamespace(ranks=SimpleNamespace(is_first=True), report_progress=None)
    bar.on_train_start(run_state)  # type: ignore[arg-type]
    report: Any = run_state.report_progress
    stream.truncate(0)
    report("slow", 0, 2)
    bar.seconds_between_work_lines = 0
    report("slow", 1, 2)
    bar.seconds_between_work_lines = 3600
    report("slow", 2, 2)
    for done in range(3):
        report("fast", done, 2)
    assert stream.getvalue().strip("\0").splitlines() == ["slow: 1/2", "slow: 2/2"]


@pytest.mark.parametrize(("platform", "gigabytes"), [("linux", 3.072), ("darwin", 0.003)])
def test_step_timer_uses_the_window_the_batch_and_the_unit_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, gigabytes: float
) -> None:
    usage = SimpleNamespace(ru_maxrss=3_000_000)
    system = SimpleNamespace(getrusage=lambda _: usage, RUSAGE_SELF=0)
    monkeypatch.setattr(metrics, "resource", system)
    monkeypatch.setattr(metrics, "sys", SimpleNamespace(platform=platform))
    recorder = Recorder()
    callbacks = [StepTimerCallback(StepTimerConfig(window=2)), recorder]
    config = training(tmp_path, 4, global_batch_size=6, batch_size_per_device=2)
    DistillTrainer(config, callbacks=callbacks).run(alternating(), batches())
    for record in recorder.records:
        values = {name: float(value) for name, value in record.metrics.items()}
        assert values["samples_per_second"] == pytest.approx(6 / values["time/iteration"])
        assert 0 < values["time/step"] <= values["time/iteration"]
        assert values["memory/host"] == pytest.approx(gigabytes)


def test_the_profiler_traces_its_iterations(tmp_path: Path) -> None:
    callbacks = [ProfilerCallback(ProfilerConfig(start=2, steps=2))]
    DistillTrainer(training(tmp_path, 5), callbacks=callbacks).run(alternating(), batches())
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "trace-000002-000003.json"
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert sum(name == "aten::mse_loss" or name == "aten::linear" for name in names) == 2


def test_parameters_are_counted_by_role(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    DistillTrainer(training(tmp_path, 2), callbacks=[ParamCountCallback()], trackers=[tracker]).run(
        alternating(), batches()
    )
    ((_, _, table),) = tracker.texts
    assert "| student.net | 12 | 12 |" in table


def test_debug_dump_holds_outputs_and_after_an_error_the_batch(tmp_path: Path) -> None:
    data = [((f"clip-{i}",), x) for i, x in enumerate(batches(4))]
    data[2][1][0, 0] = math.nan
    recorder = Recorder()
    callbacks = [DebugDumpCallback(DebugDumpConfig(every_steps=2)), recorder]
    with pytest.raises(NonFiniteLossError):
        DistillTrainer(training(tmp_path, 5), callbacks=callbacks).run(alternating(), data)
    assert sorted(p.name for p in (tmp_path / "debug").iterdir()) == [
        "error-000003", "iteration-000002",
    ]  # fmt: skip
    regular = tmp_path / "debug" / "iteration-000002"
    last: StepRecord = recorder.records[-1]
    assert torch.equal(load_file(regular / "outputs.safetensors")["out"], last.outputs["out"])
    step = json.loads((tmp_path / "debug" / "error-000003" / "step.json").read_text())
    assert step["batch_ids"] == ["clip-2"]
    assert step["losses"]["total_loss"] == "nan"
    assert step["last_finished_step"]["iteration"] == 2


def test_training_in_another_thread_works_without_signal_handlers(tmp_path: Path) -> None:
    results = []
    trainer = DistillTrainer(training(tmp_path, 2))
    thread = threading.Thread(target=lambda: results.append(trainer.run(alternating(), batches())))
    thread.start()
    thread.join()
    assert results[0].iteration == 2


@pytest.mark.parametrize(
    "name", ["debug_dump", "ema", "grad_clip", "param_count", "profiler", "step_timer"]
)
def test_every_callback_plugin_builds_from_its_defaults(name: str) -> None:
    assert name in plugin_names("distill.callbacks")
    plugin = load_plugin("distill.callbacks", name)
    needed = {"roles": ("student",)} if name == "ema" else {}
    assert plugin.build(plugin.config_class(**needed), None).name == name
