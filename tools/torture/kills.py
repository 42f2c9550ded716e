"""One process, killed by SIGKILL at random moments, and started again."""

from __future__ import annotations

import collections
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from distill_checkpoint import list_checkpoints
from torture import run_files
from torture.comparison import checkpoint_contents, differing, inspect_all, run_contents
from torture.processes import Child, kill

RunFile = Callable[[Path], dict[str, Any]]
"""Gives a run file's values for an output folder."""


class Kills:
    """One uninterrupted run, and others that are killed until all kills are done.

    Half of the kills come while a save is under way (its staging folder is there), the others
    between saves and in start-up.
    """

    def __init__(
        self, folder: Path, run_file: RunFile, *, steps: int, seed: int, all_files: bool
    ) -> None:
        self.folder = folder
        self.run_file = run_file
        self.steps = steps
        self.all_files = all_files
        self.draws = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()

    def run(self, kills: int, title: str) -> None:
        """Kill ``kills`` times, and print what was counted."""
        began = time.monotonic()
        whole = self.child("whole")
        process = whole.start()
        process.join()
        assert process.exitcode == 0, f"the uninterrupted run failed:\n{whole.end_of_log()}"
        wanted, rounds = self.contents("whole"), 0
        while self.counts["kills"] < kills:
            rounds += 1
            self.victim(f"victim-{rounds}", kills)
            found = self.contents(f"victim-{rounds}")
            assert not differing(wanted, found), (
                f"round {rounds} ended otherwise: {differing(wanted, found)}"
            )
            shutil.rmtree(self.folder / f"victim-{rounds}")
            print(f"  {title}: {self.counts['kills']} kills in {rounds} runs", flush=True)
        print(
            f"{title}: {self.counts['kills']} kills in {rounds} runs of {self.steps} iterations; "
            f"{self.counts['in a save']} of them while a save was under way, "
            f"{self.counts['before the first checkpoint']} before the first checkpoint; "
            f"{self.counts['checkpoints inspected']} checkpoints inspected after kills, all whole; "
            f"all {rounds} runs ended bit for bit like the uninterrupted one "
            f"({len(wanted)} files); {time.monotonic() - began:.0f} s",
            flush=True,
        )

    def victim(self, name: str, kills: int) -> None:
        """One run to its end, killed on the way as often as there are kills left."""
        child = self.child(name)
        while True:
            process = child.start()
            if self.counts["kills"] < kills:
                self.wait_and_kill(process, self.folder / name)
            process.join()
            if process.exitcode == 0:
                return
            assert process.exitcode == -9, f"{name} failed by itself:\n{child.end_of_log()}"
            self.counts["checkpoints inspected"] += inspect_all(self.folder / name)

    def wait_and_kill(self, process: BaseProcess, out: Path) -> None:
        """In start-up, within a save, or between two; saves are counted in this child's life."""
        kind = self.draws.choices(("start-up", "save", "anywhere"), (1, 4, 3))[0]
        if kind == "start-up":
            time.sleep(self.draws.uniform(0, 4))
        else:
            for _ in range(self.draws.randint(1, 4)):
                wait_for_a_save(process, out, whole=kind == "anywhere")
            time.sleep(self.draws.uniform(0, 0.08 if kind == "save" else 0.8))
        if process.is_alive() and kill(process):
            self.counts["kills"] += 1
            self.counts["in a save"] += any(out.glob(".staging-*"))
            self.counts["before the first checkpoint"] += not list_checkpoints(out)

    def child(self, name: str) -> Child:
        """The app with a run file of its own."""
        file = self.folder / f"{name}.yaml"
        if not file.exists():
            run_files.write(file, self.run_file(self.folder / name))
        return Child(
            app="train",
            arguments=("--config", str(file)),
            log=self.folder / f"{name}.log",
            phase=self.folder / f"{name}.phase",
        )

    def contents(self, name: str) -> dict[str, Any]:
        """What is compared of a run."""
        out = self.folder / name
        if self.all_files:
            return run_contents(out)
        return checkpoint_contents(out / f"checkpoint-{self.steps:06d}")


def wait_for_a_save(process: BaseProcess, out: Path, *, whole: bool) -> None:
    """Wait until a staging folder is there that was not, or (``whole``) a checkpoint."""
    pattern = "checkpoint-*" if whole else ".staging-*"
    before = set(out.glob(pattern))
    while process.is_alive() and not set(out.glob(pattern)) - before:
        before &= set(out.glob(pattern))
        time.sleep(0.0005)
