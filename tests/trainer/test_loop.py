"""The loop: what steps when, and what accumulation means."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_protocols import ContractError, DataError, ModelBundle, RoleHandle
from distill_trainer import (
    DistillTrainer,
    EmaCallback,
    EmaConfig,
    OptimizerConfig,
    RestartingLoader,
    ScheduleConfig,
    build_optimizers,
    schedule_factor,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toy_trainer import (
    Alternating,
    MemoryCheckpointer,
    MemoryTracker,
    Recorder,
    alternating,
    batches,
    training,
)


@given(
    interval=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    steps=st.integers(1, 11),
    per=st.sampled_from(["update", "iteration"]),
)
def test_scheduler_steps_optimizer_steps_and_averages_agree(
    tmp_path_factory: pytest.TempPathFactory, interval: int, accumulation: int, steps: int, per: Any
) -> None:
    schedule = ScheduleConfig(name="cosine", warmup_steps=2)
    method = alternating(interval, horizon=9, optimizer=OptimizerConfig(lr=0.1, schedule=schedule))
    config = training(
        tmp_path_factory.mktemp("run"), steps,
        global_batch_size=2 * accumulation, batch_size_per_device=2,
    )  # fmt: skip
    ema = EmaCallback(EmaConfig(roles=("student", "critic"), decay=0.9, per=per))
    result = DistillTrainer(config, callbacks=[ema]).run(method, batches())

    turns = steps // interval
    expected = {"student.net": turns, "critic.net": steps - turns}
    assert result.updates == expected
    for key, optimizer in method.optimizer_dict.items():
        counted = {int(state["step"]) for state in optimizer.state.values()} or {0}
        assert counted == {expected[key]}
        assert method.scheduler_dict[key].last_epoch == expected[key]
        moves = expected[key] if per == "update" else steps
        assert method.bundle.by_module("ema")[key].updates == moves
        rate = 0.1 * schedule_factor(schedule, expected[key], 9)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_accumulation_of_4_is_one_batch_of_4(tmp_path: Path) -> None:
    # SGD: AdamW's first step is the sign of the gradient, which would hide a wrong scale.
    optimizer = OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.0)
    singles = batches(24, size=1)
    fours = [torch.cat(singles[i : i + 4]) for i in range(0, 24, 4)]
    seen = []
    for data, per_device in ((fours, 4), (singles, 1)):
        method, recorder = alternating(2, optimizer=optimizer), Recorder()
        config = training(tmp_path, 6, global_batch_size=4, batch_size_per_device=per_device)
        DistillTrainer(config, callbacks=[recorder]).run(method, data)
        losses = torch.stack([record.losses["total_loss"] for record in recorder.records])
        seen.append((torch.cat([p.flatten() for m in method.model_dict.values()
                                for p in m.parameters()]), losses))  # fmt: skip
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-5, atol=1e-6)


def test_no_gradient_is_carried_into_another_turn(tmp_path: Path) -> None:
    method = alternating(2)
    DistillTrainer(training(tmp_path, 5)).run(method, batches())
    assert all(p.grad is None for m in method.model_dict.values() for p in m.parameters())


def test_hooks_come_in_their_order_with_resume_after_train_start(tmp_path: Path) -> None:
    log: list[str] = []
    callbacks = [Recorder("a", log), Recorder("b", log)]
    checkpointer = MemoryCheckpointer(resume_at=3, log=log)
    trainer = DistillTrainer(training(tmp_path, 4), callbacks=callbacks, checkpointer=checkpointer)
    result = trainer.run(alternating(), batches())
    assert log == [
        "a.train_start", "b.train_start", "checkpointer.resume",
        "a.step_start", "b.step_start", "a.before_optimizer_step", "b.before_optimizer_step",
        "a.step_end", "b.step_end", "checkpointer.after_step",
        "checkpointer.finish", "a.train_end", "b.train_end",
    ]  # fmt: skip
    assert (result.iteration, result.resumed_from) == (4, 3)
    assert [record.iteration for record in callbacks[0].records] == [4]


def test_an_error_reaches_every_callback_closes_trackers_and_comes_out(tmp_path: Path) -> None:
    class Broken(Alternating):
        def single_train_step(self, batch, iteration):  # type: ignore[no-untyped-def]
            if iteration == 2:
                raise KeyError("lost")
            return super().single_train_step(batch, iteration)

    class FailsTwice(Recorder):
        def on_exception(self, run, error):  # type: ignore[no-untyped-def]
            raise OSError("disk full")

    method = Broken(alternating().bundle, 2)
    tracker, recorder = MemoryTracker(), Recorder()
    trainer = DistillTrainer(
        training(tmp_path, 5), callbacks=[FailsTwice("first"), recorder], trackers=[tracker]
    )
    with pytest.raises(KeyError, match="lost") as excinfo:
        trainer.run(method, batches())
    assert recorder.calls[-1] == "recorder.exception:KeyError"
    assert "disk full" in excinfo.value.__notes__[0]
    assert tracker.closed


def test_a_callback_can_ask_for_a_stop(tmp_path: Path) -> None:
    class Stopper(Recorder):
        def on_step_end(self, run, step):  # type: ignore[no-untyped-def]
            if step.iteration == 3:
                run.request_stop("good enough")
                run.request_stop("a later reason")

    result = DistillTrainer(training(tmp_path, 9), callbacks=[Stopper()]).run(
        alternating(), batches()
    )
    assert (result.iteration, result.stop_reason) == (3, "good enough")


def test_names_must_differ(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="two callbacks are called 'recorder'"):
        DistillTrainer(training(tmp_path, 1), callbacks=[Recorder(), Recorder()])


def test_a_method_without_total_loss_is_refused(tmp_path: Path) -> None:
    class Nameless(Alternating):
        def single_train_step(self, batch, iteration):  # type: ignore[no-untyped-def]
            result = super().single_train_step(batch, iteration)
            return result._replace(loss_map={"loss": result.loss_map["total_loss"]})

    method = Nameless(alternating().bundle, 2)
    with pytest.raises(ContractError, match=r"\['loss'\].*total_loss"):
        DistillTrainer(training(tmp_path, 1)).run(method, batches())


def test_a_loader_that_runs_out_is_restarted_and_an_empty_one_refused(tmp_path: Path) -> None:
    DistillTrainer(training(tmp_path, 5)).run(alternating(), batches(2))
    with pytest.raises(DataError, match="yielded 0 batches"):
        DistillTrainer(training(tmp_path, 5)).run(alternating(), [])
    with pytest.raises(DataError, match="yielded 2 batches"):
        DistillTrainer(training(tmp_path, 5)).run(alternating(), iter(batches(2)))


def test_a_loader_with_a_state_that_ends_is_refused(tmp_path: Path) -> None:
    class Ends(RestartingLoader):
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(batches(3))

    recorder = Recorder()
    with pytest.raises(DataError, match=r"Ends ran out in iteration 4 of 5.*without end"):
        DistillTrainer(training(tmp_path, 5), callbacks=[recorder]).run(alternating(), Ends([]))
    assert len(recorder.records) == 3


def test_only_the_newest_outputs_are_held_while_a_micro_step_runs(tmp_path: Path) -> None:
    alive: list[int] = []
    clips: list[weakref.ref[torch.Tensor]] = []

    class Clips(Alternating):
        def single_train_step(self, batch, iteration):  # type: ignore[no-untyped-def]
            alive.append(sum(clip() is not None for clip in clips))
            result = super().single_train_step(batch, iteration)
            clip = torch.ones(64)
            clips.append(weakref.ref(clip))
            return result._replace(outputs={**result.outputs, "clip": clip})

    config = training(tmp_path, 3, global_batch_size=6, batch_size_per_device=2)
    DistillTrainer(config).run(Clips(alternating().bundle, 2), batches())
    assert alive == [0] * 9


@given(length=st.integers(1, 5), given_out=st.integers(0, 12))
def test_a_restarting_loader_goes_on_where_it_was(length: int, given_out: int) -> None:
    def take(loader: RestartingLoader, count: int) -> list[int]:
        stream = iter(loader)
        return [next(stream) for _ in range(count)]

    full = take(RestartingLoader(range(length)), given_out + 4)
    first = RestartingLoader(range(length))
    take(first, given_out)
    second = RestartingLoader(range(length))
    second.load_state_dict(first.state_dict())
    assert take(second, 4) == full[given_out:]
    assert second.state_dict() == {"batches": given_out + 4}


def test_fp16_overflow_leaves_out_optimizer_scheduler_count_and_average(tmp_path: Path) -> None:
    schedule = ScheduleConfig(name="linear")
    method = alternating(
        1, horizon=10, precision="fp16", optimizer=OptimizerConfig(lr=0.1, schedule=schedule)
    )
    assert method.grad_scaler.is_enabled()
    before = copy.deepcopy(method.model_dict["student.net"].state_dict())
    # A gradient of about 2 * 40 * 40 / 3, times the scale 2 ** 14, is beyond fp16's 65504.
    data = [torch.full((1, 3), 40.0), *batches(3)]
    ema, recorder = EmaCallback(EmaConfig(roles=("student",), decay=0.5)), Recorder()
    scale = method.grad_scaler.get_scale()

    DistillTrainer(training(tmp_path, 1), callbacks=[ema, recorder]).run(method, data)
    assert recorder.records[0].stepped == ()
    assert method.grad_scaler.get_scale() == scale / 2
    assert method.scheduler_dict["student.net"].last_epoch == 0
    assert method.update_counts["student.net"] == 0
    assert method.bundle["student"].ema["net"].updates == 0
    after = method.model_dict["student.net"].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

    recorder = Recorder()
    DistillTrainer(training(tmp_path, 12), callbacks=[recorder]).run(method, data[1:])
    stepped = sum(bool(record.stepped) for record in recorder.records)
    assert stepped > 0
    assert method.scheduler_dict["student.net"].last_epoch == stepped


def test_losses_and_metrics_of_micro_steps_are_averaged(tmp_path: Path) -> None:
    net = nn.Linear(3, 3)
    critic = RoleHandle(name="critic", modules={"net": copy.deepcopy(net)}, trainable=True)
    student = RoleHandle(name="student", modules={"net": net}, trainable=True)
    build_optimizers(student, OptimizerConfig(), horizon=1)
    method = Alternating(ModelBundle({"student": student, "critic": critic}), 1)
    data = batches(3)
    expected = [(net(x) - x.flip(1)).square().mean().item() for x in data]
    recorder = Recorder()
    config = training(tmp_path, 1, global_batch_size=6, batch_size_per_device=2)
    DistillTrainer(config, callbacks=[recorder]).run(method, data)
    record = recorder.records[0]
    assert record.losses["student_loss"].item() == pytest.approx(sum(expected) / 3)
    assert float(record.metrics["size"]) == pytest.approx(sum(float(x.norm()) for x in data) / 3)
    assert not record.losses["student_loss"].requires_grad


class _Narrow(Alternating):
    """Measures a number in 16 bits: 1 and the next one, by turns."""

    def single_train_step(self, batch, iteration):  # type: ignore[no-untyped-def]
        self.number = 3 - getattr(self, "number", 2)
        result = super().single_train_step(batch, iteration)
        value = torch.tensor(1.0 if self.number == 1 else 1.0078125, dtype=torch.bfloat16)
        return result._replace(outputs={**result.outputs, "narrow": value})


@pytest.mark.parametrize("size", [2, 4], ids=["iterations", "micro steps"])
def test_means_of_16_bit_metrics_are_taken_in_more(tmp_path: Path, size: int) -> None:
    """Half way between two neighbours of bf16, over iterations and over micro steps."""
    tracker = MemoryTracker()
    config = training(tmp_path, 4, log_every=4, global_batch_size=size, batch_size_per_device=2)
    method = _Narrow(alternating(2).bundle, 2)
    DistillTrainer(config, trackers=[tracker]).run(method, batches(8))
    assert [values["narrow"] for _, values in tracker.scalars] == [1.00390625]
