"""The apps in processes of their own, which report what they are doing and can be killed.

Children are forked from a server that has imported what is slow, so that most of a child's life is
training and saving. They are processes like any other: a kill is a kill.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from attrs import frozen

_CONTEXT = multiprocessing.get_context("forkserver")
_BLOCK = 1 << 16


@frozen(kw_only=True)
class Filling:
    """When a child fills its disk.

    Attributes:
        phase: beginning of the phase that it enters then (``RunState.enter``).
        iteration: of the run.
        room: bytes that are left free.
        file: takes up the rest.
    """

    phase: str
    iteration: int
    room: int
    file: str


@frozen(kw_only=True)
class Child:
    """One app, from its command line to its end.

    Attributes:
        arguments: of the app.
        log: takes what it prints.
        phase: file that names what it does.
    """

    app: str
    arguments: Sequence[str]
    log: Path
    phase: Path
    environment: Mapping[str, str] = {}
    filling: Filling | None = None

    def start(self) -> BaseProcess:
        """Start it."""
        child = _CONTEXT.Process(target=_run, args=(self,))
        child.start()
        return child

    def current_phase(self) -> str:
        """Say what it does: an iteration and a phase; empty before the first."""
        return self.phase.read_text().strip() if self.phase.exists() else ""

    def end_of_log(self) -> str:
        """Give the last of what it printed."""
        return self.log.read_text()[-3000:] if self.log.exists() else ""


def prepare() -> None:
    """Import what is slow in the server that children are forked from."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    _CONTEXT.set_forkserver_preload(
        ["torture.processes", "distill_train.run", "diffusers", "torch._dynamo"]
    )


def wait(child: BaseProcess, seconds: float) -> int | None:
    """Wait for its end: its exit status, or None."""
    child.join(seconds)
    return child.exitcode


def kill(child: BaseProcess) -> bool:
    """Kill it, unless it has ended by itself; returns whether it was killed."""
    child.kill()
    child.join()
    return child.exitcode == -9


def sleep_until(deadline: float) -> None:
    """Sleep to a time of ``time.monotonic``."""
    time.sleep(max(0.0, deadline - time.monotonic()))


def _run(child: Child) -> None:
    from importlib import import_module

    os.environ.update(child.environment)
    with child.log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    _watch_phases(child)
    sys.exit(import_module(f"distill_{child.app}.cli").main(list(child.arguments)))


def _watch_phases(child: Child) -> None:
    """Let the trainer note what it does, and fill the disk when it is time."""
    import distill_trainer.loop.trainer as trainer
    from distill_protocols import RunState
    from distill_trainer.monitoring.rank_monitor import RankMonitor

    monitor_ranks, descriptor = trainer.monitor_ranks, os.open(child.phase, os.O_CREAT | os.O_RDWR)

    @contextlib.contextmanager
    def watched(run: RunState, timeout: float) -> Iterator[RankMonitor | None]:
        with monitor_ranks(run, timeout) as monitor:
            enter, check = run.enter, run.check_in_sync

            def note(phase: str) -> None:
                os.pwrite(descriptor, f"{run.iteration} {phase}"[:100].ljust(100).encode(), 0)
                filling = child.filling
                if filling and (run.iteration, True) == (
                    filling.iteration, phase.startswith(filling.phase)
                ):  # fmt: skip
                    fill_disk(Path(filling.file), filling.room)

            def noted_enter(phase: str) -> None:
                note(phase)
                enter(phase)

            def noted_check(phase: str) -> None:
                note(phase)
                check(phase)

            run.enter, run.check_in_sync = noted_enter, noted_check
            yield monitor

    trainer.monitor_ranks = watched


def fill_disk(file: Path, room: int) -> None:
    """Let ``file`` take all that is free on its disk but ``room`` bytes."""
    if file.exists():
        return
    with file.open("wb", buffering=0) as stream:
        try:
            while stream.write(b"x" * _BLOCK):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        stream.truncate(max(0, stream.tell() - room))
