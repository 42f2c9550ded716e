"""Ranks that fail, die, stop or diverge: all others end and name the rank."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import monitor_ranks
import pytest
import torch
from distill_protocols import Callback, RankError, RunState
from distill_runtime import ALONE, Ranks
from distill_trainer import DistillTrainer, RestartingLoader
from distill_trainer.monitoring import status_store
from distill_trainer.monitoring.rank_monitor import RankMonitor
from distill_trainer.monitoring.status_store import RankStatus, StatusStore
from ranks import run_on_ranks
from toy_trainer import Recorder, alternating, batches, training

STEP = "iteration 3, forward and backward of micro step 1 of 1"
SEEN = r"(come|answer), last seen \d+\.\d s ago at"


def test_ranks_in_sync_end_without_error(tmp_path: Path) -> None:
    assert run_on_ranks(monitor_ranks.fail_in_a_step, tmp_path, "none") == ["no error", "no error"]


# Either rank, as each hosts one of the two stores.
@pytest.mark.parametrize(("failure", "rank"), [("kill", 0), ("kill", 1), ("stop", 1)])
def test_a_rank_that_is_gone_is_named_with_its_place(
    tmp_path: Path, failure: str, rank: int
) -> None:
    outcomes = run_on_ranks(
        monitor_ranks.fail_in_a_step,
        tmp_path,
        failure,
        rank,
        timeout=monitor_ranks.timeout_for(failure),
    )
    assert outcomes[rank] == ""
    assert outcomes[1 - rank].startswith(
        f"RankError: rank {1 - rank} waited for the others at iteration 3, "
    )
    assert re.search(rf"rank {rank} did not {SEEN} {STEP}", outcomes[1 - rank])


def test_of_many_ranks_the_dead_one_is_named_by_all(tmp_path: Path) -> None:
    """Also by one that lost not it, but another survivor, which had ended of it."""
    first, dead, last = run_on_ranks(monitor_ranks.fail_in_a_step, tmp_path, "kill", 1, size=3)
    assert dead == ""
    for survivor in (first, last):
        assert re.search(rf"rank 1 did not {SEEN} {STEP}", survivor)
        assert "Read the log of rank 1 first" in survivor


def test_without_any_store_the_last_check_is_named(tmp_path: Path) -> None:
    _, survivor, _ = run_on_ranks(monitor_ranks.fail_in_a_step, tmp_path, "kill", 0, 2, size=3)
    assert re.search(
        r"ranks 0, 2 did not (come|answer), no word of it; all were last together \d+\.\d s ago at "
        "iteration 2, end of the iteration",
        survivor,
    )


def test_a_slow_rank_is_given_up_and_raises(tmp_path: Path) -> None:
    waited, slow = run_on_ranks(monitor_ranks.fail_in_a_step, tmp_path, "slow", 1, timeout=4)
    assert re.search(rf"rank 1 did not {SEEN} {STEP}", waited)
    assert "raise DistributedConfig.timeout_seconds (4)" in waited
    assert slow.startswith("RankError: ")
    assert "they gave this rank up: rank 0 at iteration 3, " in slow
    # gloo's two words for its timeout: whichever of its threads sees it first.
    assert re.search(r"lost the others \((Timed out|Application timeout)", slow)


@pytest.mark.parametrize(
    ("failure", "rank", "error"),
    [
        ("raise", 0, "ValueError: boom"),
        ("runtime", 1, "RuntimeError: boom in a kernel"),
        ("interrupt", 1, "KeyboardInterrupt"),
    ],
)
def test_other_ranks_report_the_error_of_the_failed_one(
    tmp_path: Path, failure: str, rank: int, error: str
) -> None:
    outcomes = run_on_ranks(monitor_ranks.fail_in_a_step, tmp_path, failure, rank)
    assert outcomes[rank].startswith(error), "it keeps its own error"
    assert (
        f"rank {rank} of 2 was at {STEP}. The others: rank {1 - rank} last seen" in outcomes[rank]
    )
    assert outcomes[1 - rank].startswith(f"RankError: rank {1 - rank} waited for the others")
    assert re.search(
        rf"rank {rank} failed at {STEP} \(\d+\.\d s ago\): {re.escape(error)}", outcomes[1 - rank]
    )
    assert f"Read the log of rank {rank} first" in outcomes[1 - rank]


def test_a_loss_that_is_not_finite_on_one_rank_ends_all(tmp_path: Path) -> None:
    for rank, outcomes in enumerate(run_on_ranks(monitor_ranks.fail_in_a_step, tmp_path, "inf", 1)):
        assert "iteration 3: the loss is not finite (total_loss=inf" in outcomes
        assert rank == 1 or "rank 1" in outcomes


@pytest.mark.parametrize("failure", ["kill", "raise", "stop"])
def test_a_rank_that_is_missed_in_a_collective_of_a_callback(tmp_path: Path, failure: str) -> None:
    survivor, other = run_on_ranks(
        monitor_ranks.fail_before_a_collective,
        tmp_path,
        failure,
        timeout=monitor_ranks.timeout_for(failure),
    )
    assert survivor.startswith("RankError: rank 0 waited for the others at iteration 2, sum over")
    if failure == "raise":
        assert other.startswith("ValueError: boom")
        assert re.search(r"rank 1 failed at iteration 2, sum over ranks .*ValueError: b", survivor)
    else:
        assert re.search(r"rank 1 did not answer, last seen .* at iteration 2, sum over", survivor)


@pytest.mark.parametrize(("failure", "sharded"), [("stop", False), ("kill", True)])
def test_a_rank_that_is_missed_in_backward_or_a_gather(
    tmp_path: Path, failure: str, sharded: bool
) -> None:
    survivor, _ = run_on_ranks(
        monitor_ranks.fail_beside_backward,
        tmp_path,
        failure,
        sharded,
        timeout=monitor_ranks.timeout_for(failure),
    )
    assert survivor.startswith(f"RankError: rank 0 waited for the others at {STEP} and lost them")
    assert re.search(rf"rank 1 did not {SEEN} {STEP}", survivor)


@pytest.mark.parametrize("failure", ["kill", "raise"])
def test_a_rank_that_fails_when_training_is_over(tmp_path: Path, failure: str) -> None:
    survivor, other = run_on_ranks(monitor_ranks.fail_after_the_end, tmp_path, failure)
    assert survivor.startswith("RankError: rank 0 waited for the others at iteration 5, callback")
    if failure == "raise":
        assert other.startswith("ValueError: boom")
        assert "rank 1 failed at iteration 5, callback 'ends', on_train_end" in survivor
    else:
        assert "rank 1 did not come, last seen" in survivor


def test_ranks_in_different_phases_raise_instead_of_waiting(tmp_path: Path) -> None:
    polled = run_on_ranks(monitor_ranks.poll_unequally, tmp_path)
    assert polled[0] == polled[1]
    assert "rank 0 at iteration 2, callback 'asks', on_step_end (check 3)" in polled[0]
    assert "rank 1 at iteration 2, mean over ranks (check 1)" in polled[0]
    trained = run_on_ranks(monitor_ranks.train_unequally, tmp_path)
    assert trained[0] == trained[1]
    assert (
        "rank 0 at iteration 2, end of the iteration (check 1), rank 1 at iteration 1, end"
        in trained[0]
    )


def test_all_ranks_must_have_the_same_run() -> None:
    run = {"training": {"seed": 1, "steps": 5}, "roles": ["a", "b"]}
    other = {"training": {"seed": 2}, "roles": ["a", "b"], "more": {}}
    assert run_on_ranks(monitor_ranks.check_run_files, [run, dict(reversed(run.items()))]) == [
        "no error",
        "no error",
    ]
    outcomes = run_on_ranks(monitor_ranks.check_run_files, [run, run, other], size=3)
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0].startswith(
        "RankError: rank 2 differs from rank 0 in training.seed: 2 (rank 0: 1), training.steps: "
        "absent (rank 0: 5), more: {} (rank 0: absent). All ranks must"
    )
    assert "Start all ranks with the same run file" in outcomes[0]


def test_a_single_process_raises_its_errors_unchanged(tmp_path: Path) -> None:
    class Checks(Callback):
        name = "checks"

        def on_step_end(self, run: RunState, step: Any) -> None:
            run.enter("anything")
            run.check_in_sync("anything")
            raise ValueError("boom")

    recorder = Recorder()
    with pytest.raises(ValueError, match="boom") as excinfo:
        DistillTrainer(training(tmp_path, 3), callbacks=[recorder, Checks()]).run(
            alternating(), batches()
        )
    assert not hasattr(excinfo.value, "__notes__")
    assert recorder.calls[-1] == "recorder.exception:ValueError"


class _FixedStore(StatusStore):
    """Holds the statuses of the others that a test gives it."""

    def __init__(self, statuses: dict[int, RankStatus]) -> None:
        super().__init__(0, 4, [])
        self.statuses = statuses

    def exchange(self, status: RankStatus) -> dict[int, RankStatus]:
        return self.statuses


def test_ranks_that_have_come_are_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = alternating()
    run = RunState(
        method=method, loader=RestartingLoader(batches()), streams=method.streams,
        output_dir=tmp_path, max_train_steps=1, ranks=ALONE, iteration=4,
    )  # fmt: skip
    here = RankStatus(number=9, iteration=4, phase="optimizer step", checks=1)
    others = {
        1: here,
        2: RankStatus(number=5, iteration=3, phase="data", checks=0),
        3: attrs.evolve(here, error="lost", lost_others=True),
    }

    def gone(*_: Any, **__: Any) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [1]:2. Hm")

    monkeypatch.setattr(torch.distributed, "all_reduce", gone)
    ranks = Ranks(rank=0, size=4, timeout=7.0)
    with pytest.raises(RankError) as excinfo:
        RankMonitor(run, ranks, _FixedStore(others)).check_in_sync("optimizer step")
    assert "(Connection closed by peer [1]:2): rank 2 did not come, last seen" in str(excinfo.value)
    assert not re.search("ranks? 1|ranks? 3", str(excinfo.value))


def test_a_status_store_that_cannot_be_started_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("wait timeout after 5000ms, keys: /init/")

    monkeypatch.setattr(status_store, "TCPStore", fails)
    store = StatusStore.connect(Ranks())
    status = RankStatus(number=1, iteration=3, phase="step", checks=0)
    store.publish(status)
    assert store.exchange(status) == {}
    assert "no status store can be started" in caplog.text
