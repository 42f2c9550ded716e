"""Logs of a run that was stopped or killed are those of one that was not."""

from __future__ import annotations

import pytest
from distill_checkpoint import CheckpointConfig, CheckpointManager, KeepBestConfig
from distill_trainer import DistillTrainer
from logged_runs import kill, read_logs, stop, train_logged
from ranks import run_on_ranks
from toy_trainer import MemoryTracker, alternating, batches, training


@pytest.fixture(scope="module")
def uninterrupted(_folders_in_memory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train_logged(folder)
    lines, scalars = read_logs(folder)
    assert [line["iteration"] for line in lines] == [3, 6, 8]
    return lines, scalars


@pytest.mark.parametrize(
    "events",
    [
        # Between two log points; right after one; and once more, so that a window has three parts.
        [(4, stop)],
        [(3, stop)],
        [(4, stop), (5, stop)],
        # Iteration 6 was logged already, and the checkpoint is of iteration 4; then before any.
        [(6, kill)],
        [(7, kill), (8, kill)],
        [(1, kill)],
    ],
    ids=lambda events: "-".join(f"{event.__name__}{at}" for at, event in events),
)
def test_logs_are_those_of_a_run_that_nobody_stopped(uninterrupted, tmp_path, events):
    train_logged(tmp_path, *events)
    assert read_logs(tmp_path) == uninterrupted


def test_on_several_ranks_too(tmp_path):
    for name, events in (("whole", []), ("parts", [(4, stop), (7, kill)])):
        outcomes = run_on_ranks(train_logged, tmp_path / name, *events)
        assert outcomes == [None, None], outcomes
    assert read_logs(tmp_path / "parts") == read_logs(tmp_path / "whole")


def test_metrics_saved_by_another_number_of_ranks_are_kept(tmp_path):
    outcomes = run_on_ranks(train_logged, tmp_path, (4, stop), (5, stop))
    assert outcomes == [None, None], outcomes
    train_logged(tmp_path / "one")
    (two, _), (one, _) = read_logs(tmp_path), read_logs(tmp_path / "one")
    assert [line["iteration"] for line in two] == [line["iteration"] for line in one]


def test_checkpoints_are_kept_by_the_mean_of_a_loss(tmp_path, caplog):
    """As trackers show it: the mean since the last log point, though it is the other turn's."""
    rule = KeepBestConfig(metric="loss/critic_loss", mode="max")
    config = CheckpointConfig(every_steps=2, keep_last=1, keep_best=rule)
    tracker = MemoryTracker()
    manager = CheckpointManager(config, tmp_path, {})
    DistillTrainer(
        training(tmp_path, 8, log_every=2), trackers=[tracker], checkpointer=manager
    ).run(alternating(2), batches())
    shown = {i: values["loss/critic_loss"] for i, values in tracker.scalars}
    best = max(shown, key=shown.__getitem__)
    kept = sorted(int(path.name[-6:]) for path in tmp_path.glob("checkpoint-*"))
    assert kept == sorted({best, 8})
    assert "no candidate" not in caplog.text
