"""A stop in the middle of an iteration: as if that iteration had never begun."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from checkpoint.test_resume import RESUME, find_differences, manager
from distill_checkpoint import CheckpointConfig, KeepBestConfig
from distill_checkpoint.manifest import inspect
from distill_protocols import Callback, RandomStreams, RunState, StepRecord, StepResult
from distill_trainer.loop.rollback import RollbackPoint
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import Run, Shape, TinyMethod, bundle, new_run
from torch import Tensor, nn

MOMENTS = 4
"""At which a stop can be asked for in a micro step: before each of three model calls, and after
the last, where only the trainer is left to see it."""


class Polling(TinyMethod):
    """Polls before each model call, like a rollout, and moves state of its own in each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.history: list[int] = []
        self.ask_in, self.ask_at, self._moment = 0, 0, 0
        for module in self.model_dict.values():
            module.register_forward_pre_hook(self._before_a_call)

    def _before_a_call(self, *_: Any) -> None:
        self._pass_moment()
        self.stop.poll()

    def _pass_moment(self) -> None:
        if self._iteration == self.ask_in and self._moment == self.ask_at:
            self.stop.request("asked to")
        self._moment += 1

    def single_train_step(self, batch: Tensor, iteration: int) -> StepResult:
        self._iteration = iteration
        self.history.append(iteration)
        result = super().single_train_step(batch, iteration)
        self._pass_moment()
        return result

    def optimizers_zero_grad(self, iteration: int) -> None:
        super().optimizers_zero_grad(iteration)
        self._moment = 0

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.history = list(state["history"])


class Drawing(Callback):
    """Moves a generator of the run before the first micro step."""

    name = "drawing"

    def on_step_start(self, run: RunState) -> None:
        torch.randn(3, generator=run.streams.get("drawing"))


def polling_run(shape: Shape, *, seed: int = 0) -> Run:
    run = new_run(shape, seed=seed)
    method = Polling(bundle(shape, seed), None, streams=RandomStreams(seed=7))
    method.interval = shape.interval
    torch.manual_seed(seed)
    return Run(shape=shape, method=method, callbacks={"drawing": Drawing(), **run.callbacks})


SHAPES = st.builds(
    Shape,
    interval=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    ema_roles=st.sampled_from([(), ("student",), ("critic", "student")]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    width=st.integers(2, 5),
)


@settings(max_examples=15)
@given(
    n=st.integers(1, 3), m=st.integers(1, 3), shape=SHAPES, in_background=st.booleans(),
    data=st.data(),
)  # fmt: skip
def test_n_steps_stop_within_the_next_save_resume_is_an_uninterrupted_run(
    n, m, shape, in_background, data
):
    moment = data.draw(st.integers(0, MOMENTS * shape.accumulation - 1), label="moment")
    check(n, m, shape, moment, in_background)


@pytest.mark.parametrize("moment", range(2 * MOMENTS))
def test_every_moment_of_an_iteration(moment):
    check(1, 2, Shape(precision="fp16", accumulation=2), moment)


def check(n: int, m: int, shape: Shape, moment: int, in_background: bool = False) -> None:
    # In the background one is still being written while the next iteration is taken back.
    saves = CheckpointConfig(
        every_steps=1 if in_background else None, keep_last=1, async_save=in_background
    )
    finishes = moment == MOMENTS * shape.accumulation - 1  # nobody polls after it
    last = n + 1 if finishes else n
    with TemporaryDirectory() as name:
        folder = Path(name)
        before, full, stopped = (folder / part for part in ("before", "whole", "stopped"))
        expected = polling_run(shape)
        expected.train(before, last)
        uninterrupted = polling_run(shape)
        uninterrupted.train(full, n + m)

        run = polling_run(shape)
        run.method.ask_in, run.method.ask_at = n + 1, moment
        run.train(stopped, n + m + 1, manager(stopped, saves))
        assert find_differences(expected.everything(), run.everything()) == []
        modules = run.method.model_dict.values()
        assert all(p.grad is None for module in modules for p in module.parameters())
        assert [path.name for path in stopped.glob("checkpoint-*")] == [f"checkpoint-{last:06d}"]

        resumed = polling_run(shape, seed=1)
        resumed.train(stopped, n + m, manager(stopped, RESUME))
        assert find_differences(uninterrupted.everything(), resumed.everything()) == []


def test_a_manifest_records_the_metrics_of_its_iteration(tmp_path):
    run = polling_run(Shape())
    run.method.ask_in, run.method.ask_at = 3, 1

    def measure(state: RunState, step: StepRecord) -> None:
        state.metrics["report/fd"] = float(step.iteration)

    run.callbacks["tally"].on_step_end = measure
    config = CheckpointConfig(every_steps=9, keep_best=KeepBestConfig(metric="report/fd"))
    run.train(tmp_path, 9, manager(tmp_path, config))
    manifest = inspect(tmp_path / "checkpoint-000002", checksums=True).manifest
    assert manifest is not None
    assert manifest.metrics == {"report/fd": 2.0}


def test_a_stop_in_the_first_iteration_saves_nothing_and_leaves_the_beginning(tmp_path):
    shape = Shape(accumulation=2)
    run, fresh = polling_run(shape), polling_run(shape)
    run.method.ask_in, run.method.ask_at = 1, 5
    fresh.callbacks["ema"].on_train_start(fresh.state(tmp_path, 0))
    run.train(tmp_path, 3, manager(tmp_path))
    assert find_differences(fresh.everything(), run.everything()) == []
    assert list(tmp_path.iterdir()) == []


def test_buffers_that_no_checkpoint_holds_are_not_copied(tmp_path):
    """Rope tables and the like may be large, and no forward moves them."""
    run = new_run(Shape())
    module = run.method.bundle["critic"].modules["transformer"]
    module.register_buffer("table", torch.zeros(3), persistent=False)
    point = RollbackPoint(run.state(tmp_path, 0))
    norm = module[1]
    assert isinstance(norm, nn.BatchNorm1d)
    norm.running_mean.fill_(4.0)
    norm.num_batches_tracked = norm.num_batches_tracked + 1  # a new tensor, as torch does it
    module.table.fill_(4.0)
    point.restore()
    assert norm.running_mean.eq(0).all()
    assert norm.num_batches_tracked == 0
    assert module.table.eq(4).all()
