"""Asynchronous saves: the training goes on, nothing is lost, and every error is heard of."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest
import torch
from distill_checkpoint import CheckpointConfig, CheckpointManager, StoredCheckpoint
from distill_checkpoint.manifest import inspect
from distill_protocols import CheckpointError
from distill_trainer import DistillTrainer
from ranks import CONTEXT
from tiny_run import Run, Shape, new_run, save_and_leave
from toy_trainer import MemoryTracker, training

ASYNC = CheckpointConfig(async_save=True)


class Gate:
    """Holds up the last step of every save until it is opened, and may let it fail."""

    def __init__(self, monkeypatch) -> None:
        self.open = threading.Event()
        self.fails = False
        from distill_checkpoint import manager

        commit = manager._commit

        def wait(*args) -> None:
            assert self.open.wait(60)
            if self.fails:
                raise OSError(28, "No space left on device")
            commit(*args)

        monkeypatch.setattr(manager, "_commit", wait)


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.method.bundle["critic"].moving_state("transformer")


def test_training_does_not_reach_what_is_being_written(tmp_path, gate):
    run = new_run(Shape())
    before = {name: value.detach().clone() for name, value in weights(run).items()}
    manager = CheckpointManager(ASYNC, tmp_path, {})
    for name in ("checkpoint-000001", "checkpoint-000002"):
        target = manager.save(run.state(tmp_path, int(name[-1])), run.callbacks)
        assert target == tmp_path / name
        assert not target.exists()
        with torch.no_grad():
            for value in weights(run).values():
                value.fill_(7)
        gate.open.set()
        manager.finish(run.state(tmp_path, int(name[-1])), run.callbacks)
        source = StoredCheckpoint.open(target).weights("critic")["transformer"]
        assert all(torch.equal(before[n], v) for n, v in source.read(before).items())
        before = {name: value.detach().clone() for name, value in weights(run).items()}
        gate.open.clear()
    # The same memory serves save after save.
    kept = {key: value.data_ptr() for key, value in manager._buffers._kept.items()}
    gate.open.set()
    manager.save(run.state(tmp_path, 3), run.callbacks)
    assert kept == {key: value.data_ptr() for key, value in manager._buffers._kept.items()}
    manager.finish(run.state(tmp_path, 3), run.callbacks)


def test_the_next_save_waits_for_the_one_before(tmp_path, gate):
    run = new_run(Shape(ema_roles=()))
    manager = CheckpointManager(ASYNC, tmp_path, {})
    first = manager.save(run.state(tmp_path, 1), run.callbacks)
    threading.Timer(0.2, gate.open.set).start()
    manager.save(run.state(tmp_path, 2), run.callbacks)
    assert inspect(first, checksums=True).damage is None
    manager.finish(run.state(tmp_path, 2), run.callbacks)
    assert (tmp_path / "checkpoint-000002").exists()


def next_step(manager, run, folder):
    manager.after_step(run.state(folder, 2), run.callbacks)


def next_save(manager, run, folder):
    manager.save(run.state(folder, 2), run.callbacks)


def finish(manager, run, folder):
    manager.finish(run.state(folder, 1), run.callbacks)


def resume(manager, run, folder):
    manager.resume(run.state(folder, 0), run.callbacks)


@pytest.mark.parametrize("then", [next_step, next_save, finish, resume])
def test_an_error_in_the_background_is_raised_once(tmp_path, gate, then):
    run = new_run(Shape(ema_roles=()))
    manager = CheckpointManager(ASYNC, tmp_path, {})
    gate.fails = True
    manager.save(run.state(tmp_path, 1), run.callbacks)
    next_step(manager, run, tmp_path)  # it goes on; nobody waits for it
    gate.open.set()
    manager._background._thread.join()
    with pytest.raises(CheckpointError, match=r"could not be saved: .*No space left on device"):
        then(manager, run, tmp_path)
    assert list(tmp_path.iterdir()) == []
    gate.fails = False
    next_save(manager, run, tmp_path)
    manager.finish(run.state(tmp_path, 2), run.callbacks)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000002"]


@pytest.mark.parametrize("fails", [False, True])
def test_when_training_raises_the_save_under_way_is_waited_for(tmp_path, gate, fails):
    run = new_run(Shape())
    gate.fails = fails

    def raises(state) -> None:
        if state.iteration == 3:
            threading.Timer(0.2, gate.open.set).start()
            raise RuntimeError("training fails")

    run.callbacks["tally"].on_step_start = raises
    config = CheckpointConfig(async_save=True, every_steps=2)
    with pytest.raises(RuntimeError, match="training fails") as excinfo:
        run.train(tmp_path, 5, CheckpointManager(config, tmp_path, {}))
    notes = getattr(excinfo.value, "__notes__", [])
    assert any("No space left on device" in note for note in notes) == fails
    assert (tmp_path / "checkpoint-000002").exists() == (not fails)


@pytest.mark.parametrize("in_background", [False, True])
def test_trackers_and_the_log_see_the_stall(tmp_path, caplog, in_background):
    caplog.set_level(logging.INFO)
    run, tracker = new_run(Shape()), MemoryTracker()
    caplog.set_level(logging.DEBUG, logger="distill_checkpoint")
    config = CheckpointConfig(async_save=in_background, every_steps=2)
    DistillTrainer(
        training(tmp_path, 5, log_every=1), callbacks=list(run.callbacks.values()),
        trackers=[tracker], checkpointer=CheckpointManager(config, tmp_path, {}),
    ).run(run.method, run.loader)  # fmt: skip
    name = "time/checkpoint"
    seen = {i: values[name] for i, values in tracker.scalars if name in values}
    assert list(seen) == [3, 5]  # of the saves after 2 and 4: known when their iteration was over
    assert all(value > 0 for value in seen.values())
    kind = "an asynchronous" if in_background else "a synchronous"
    assert caplog.text.count(f"{kind} save held up the training") == 3


def test_a_process_that_ends_finishes_its_save(tmp_path):
    child = CONTEXT.Process(target=save_and_leave, args=(str(tmp_path), 300_000))
    child.start()
    child.join(120)
    assert child.exitcode == 3
    assert inspect(tmp_path / "checkpoint-000001", checksums=True).damage is None
