"""SIGTERM to one of two ranks: both stop at the same point."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_protocols import RunState
from distill_runtime import ALONE
from distill_trainer import DistillTrainer, RestartingLoader
from torch import distributed
from toy_trainer import Alternating, MemoryCheckpointer, Recorder, alternating, batches, training

_FORK = multiprocessing.get_context("fork")
_REASON = "received SIGTERM (rank 1)"


class _Rollout(Alternating):
    """Polls before each of ``calls`` model calls; rank 1 waits in one of them for its signal."""

    pipe: Any = None
    wait_at: tuple[int, int] = (0, 0)
    calls = 0
    waits = True
    done: list[tuple[int, int]]

    def single_train_step(self, batch: Any, iteration: int) -> Any:
        for call in range(1, self.calls + 1):
            self.stop.poll()
            self.done.append((iteration, call))
            if self.waits and (iteration, call) == self.wait_at:
                self.waits = False
                self.pipe.send("under way")
                assert self.pipe.poll(60)
                self.pipe.recv()
        return super().single_train_step(batch, iteration)


def _rank(rank: int, pipe: Any, folder: Path, case: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
        )
        method = _Rollout(alternating().bundle, 2)
        method.done, method.pipe, method.calls = [], pipe, case["calls"]
        if rank == 1:
            method.wait_at = case["wait_at"]
        recorder, saved = Recorder(), MemoryCheckpointer()
        micro = case["micro"]
        config = training(
            folder / f"rank-{rank}", case["steps"],
            global_batch_size=2 * 2 * micro, batch_size_per_device=2,
        )  # fmt: skip
        result = DistillTrainer(config, callbacks=[recorder], checkpointer=saved).run(
            method, batches()
        )
        weights = {
            name: value.tolist()
            for key, module in method.model_dict.items()
            for name, value in {f"{key}.{n}": p for n, p in module.named_parameters()}.items()
        }
        distributed.barrier()  # the run's own group is gone, the others' work
        pipe.send((result.iteration, result.stop_reason, saved.saved, method.done, weights))
    except BaseException:
        pipe.send(traceback.format_exc())
    os._exit(0)


@pytest.mark.parametrize(
    ("case", "last", "calls"),
    [
        # In a rollout: the poll before the next model call.
        ({"micro": 1, "calls": 3, "wait_at": (3, 2), "steps": 50}, 2, [(3, 1), (3, 2)]),
        # After its last call only the loop asks, at the end of the iteration.
        ({"micro": 1, "calls": 1, "wait_at": (3, 1), "steps": 50}, 3, [(3, 1)]),
        # Or between two micro steps.
        ({"micro": 4, "calls": 1, "wait_at": (2, 1), "steps": 50}, 1, [(2, 1)]),
        # In the very last iteration.
        ({"micro": 1, "calls": 1, "wait_at": (2, 1), "steps": 2}, 2, [(2, 1)]),
    ],
)
def test_a_signal_to_one_rank_stops_all_at_the_same_point(
    tmp_path: Path, case: dict[str, Any], last: int, calls: list[tuple[int, int]]
) -> None:
    pipes = [_FORK.Pipe() for _ in range(2)]
    ranks = [
        _FORK.Process(target=_rank, args=(rank, child_end, tmp_path, case))
        for rank, (_, child_end) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    try:
        parent_end = pipes[1][0]
        assert parent_end.poll(60), "rank 1 never came to the call in which it waits"
        message = parent_end.recv()
        assert message == "under way", message
        os.kill(ranks[1].pid, signal.SIGTERM)  # type: ignore[arg-type]
        parent_end.send("go on")
        outcomes = []
        for pipe, _ in pipes:
            assert pipe.poll(60), "a rank did not stop"
            outcomes.append(pipe.recv())
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()
    assert outcomes[0] == outcomes[1]
    iteration, reason, saved, done, _ = outcomes[0]
    assert (iteration, reason) == (last, _REASON)
    assert saved == list(range(1, last + 1))
    assert [call for call in done if call[0] == case["wait_at"][0]] == calls


def test_all_ranks_have_the_stop_reason_of_the_first(tmp_path: Path) -> None:
    pipes = [_FORK.Pipe() for _ in range(2)]
    ranks = [
        _FORK.Process(target=_asks, args=(rank, child_end, tmp_path))
        for rank, (_, child_end) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    try:
        for pipe, _ in pipes:
            assert pipe.poll(60)
            before, reasons = pipe.recv()
            assert before is None
            assert reasons == ["ä" * 300 + " (rank 0)"] * 2
    finally:
        for process in ranks:
            process.join(5)
            if process.is_alive():
                process.kill()


def _asks(rank: int, pipe: Any, folder: Path) -> None:

    from distill_trainer.monitoring.rank_monitor import monitor_ranks

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    method = alternating()
    run = RunState(
        method=method, loader=RestartingLoader(batches()), streams=method.streams,
        output_dir=folder, max_train_steps=1, ranks=ALONE,
    )  # fmt: skip
    reasons = []
    for _ in range(2):  # two runs in one process, each with a group of its own
        with monitor_ranks(run, 60.0):
            method.stop.request("ä" * 300 if rank == 0 else "another")
            before = method.stop.reason
            method.stop.requested()
            reasons.append(method.stop.reason)
    pipe.send((before, reasons))
    os._exit(0)
