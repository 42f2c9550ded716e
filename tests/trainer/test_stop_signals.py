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
from distill_trainer.loop import signals
from toy_trainer import Alternating, MemoryCheckpointer, Recorder, alternating, batches, training

# fork: a child that imports torch by itself takes seconds.
_FORK = multiprocessing.get_context("fork")


class _Slow(Alternating):
    """Says that an iteration is under way, and then takes its time over it."""

    def single_train_step(self, batch: Any, iteration: int) -> Any:
        if iteration == 3:
            self.pipe.send("under way")
            self.pipe.poll(60)  # until the parent has sent its signals
            time.sleep(0.05)
        return super().single_train_step(batch, iteration)

    pipe: Any = None


TORCHRUN, UV = "TORCHELASTIC_RUN_ID", "UV_RUN_RECURSION_DEPTH"


def _child(pipe: Any, folder: Path, launcher: str | None, moment: float) -> None:
    torch.set_num_threads(1)
    for name in (TORCHRUN, UV):  # the tests may be started by one
        os.environ.pop(name, None)
    if launcher is not None:
        os.environ[launcher] = "1"
        signals.REPEATED_SIGINT_SECONDS = moment
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 2)  # as behind a tee, which Ctrl-C ends first
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


def _run(
    folder: Path, *numbers: signal.Signals, launcher: str | None = None, moment: float = 60.0
) -> Any:
    parent_end, child_end = _FORK.Pipe()
    child = _FORK.Process(target=_child, args=(child_end, folder, launcher, moment))
    child.start()
    try:
        assert parent_end.poll(60), "the child never came to iteration 3"
        parent_end.recv()
        for number in numbers:
            os.kill(child.pid, number)  # type: ignore[arg-type]
            time.sleep(0.1)  # two signals at once may arrive as one
        parent_end.send("go on")
        assert parent_end.poll(60), "the child did not stop"
        return parent_end.recv()
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


@pytest.mark.parametrize(
    ("first", "launcher"),
    [(signal.SIGINT, TORCHRUN), (signal.SIGTERM, TORCHRUN), (signal.SIGINT, UV)],
)
def test_one_forwarded_ctrl_c_counts_once(
    tmp_path: Path, first: signal.Signals, launcher: str
) -> None:
    """The terminal's SIGINT, and each launcher's copy of it within a moment."""
    outcome, last_hook, _, saved, restored = _run(
        tmp_path, first, signal.SIGINT, signal.SIGINT, launcher=launcher
    )
    assert outcome == (3, f"received {first.name}")
    assert last_hook == "recorder.train_end"
    assert saved == [1, 2, 3]
    assert restored


def test_under_a_launcher_a_later_sigint_interrupts(tmp_path: Path) -> None:
    outcome, _, _, saved, restored = _run(
        tmp_path, signal.SIGINT, signal.SIGINT, launcher=TORCHRUN, moment=0.01
    )
    assert outcome == "KeyboardInterrupt"
    assert saved == [1, 2]
    assert restored
