"""Real signals to a real child process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_trainer import DistillTrainer
from toy_trainer import Alternating, MemoryCheckpointer, Recorder, alternating, batches, training

# fork: a child that imports torch by itself takes seconds.
_FORK = multiprocessing.get_context("fork")


class _Slow(Alternating):
    """Says that an iteration is under way, and then takes its time over it."""

    def single_train_step(self, batch: Any, iteration: int) -> Any:
        if iteration == 3:
            self.pipe.send("under way")
            self.pipe.poll(20)  # until the parent has sent its signals
            time.sleep(0.05)
        return super().single_train_step(batch, iteration)

    pipe: Any = None


def _child(pipe: Any, folder: Path) -> None:
    torch.set_num_threads(1)
    handler = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    method = _Slow(alternating().bundle, 2)
    method.pipe = pipe
    recorder, checkpointer = Recorder(), MemoryCheckpointer()
    trainer = DistillTrainer(
        training(folder, 1000), callbacks=[recorder], checkpointer=checkpointer
    )
    try:
        result = trainer.run(method, batches())
        outcome: Any = (result.iteration, result.stop_reason)
    except KeyboardInterrupt:
        outcome = "KeyboardInterrupt"
    restored = (
        signal.getsignal(signal.SIGTERM) == handler
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    pipe.send((outcome, recorder.calls[-1], checkpointer.calls[-1], checkpointer.saved, restored))
    os._exit(0)


def _run(folder: Path, *signals: signal.Signals) -> Any:
    here, there = _FORK.Pipe()
    child = _FORK.Process(target=_child, args=(there, folder))
    child.start()
    try:
        assert here.poll(20), "the child never came to iteration 3"
        here.recv()
        for number in signals:
            os.kill(child.pid, number)  # type: ignore[arg-type]
            time.sleep(0.1)  # two signals at once may arrive as one
        here.send("go on")
        assert here.poll(20), "the child did not stop"
        return here.recv()
    finally:
        child.join(5)
        if child.is_alive():
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_iteration_under_way(
    tmp_path: Path, number: signal.Signals
) -> None:
    outcome, last_hook, last_save, saved, restored = _run(tmp_path, number)
    assert outcome == (3, f"received {number.name}")
    assert last_hook == "recorder.train_end"
    assert last_save == "checkpointer.finish"
    assert saved == [1, 2, 3]
    assert restored


def test_a_second_sigint_interrupts(tmp_path: Path) -> None:
    outcome, last_hook, _, saved, restored = _run(tmp_path, signal.SIGINT, signal.SIGINT)
    assert outcome == "KeyboardInterrupt"
    assert last_hook == "recorder.exception:KeyboardInterrupt"
    assert saved == [1, 2]
    assert restored
