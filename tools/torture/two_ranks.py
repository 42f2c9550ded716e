"""Two processes of one run, one of which is killed in a step, a save or a validation."""

from __future__ import annotations

import collections
import random
import shutil
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from torture import run_files
from torture.comparison import differing, inspect_all, run_contents
from torture.processes import Child, kill, wait

SIZE = 2
PATIENCE = 150.0
"""Seconds in which the other rank must end by itself."""
PHASES = {
    "step": ("data", "forward and backward", "gradients"),
    "save": ("save",),
    "validation": ("callback 'validation'",),
}
"""Beginnings of the phases that a kill is meant for."""


class RankKills:
    """One uninterrupted run of two ranks, and others of which a rank is killed now and then."""

    def __init__(self, folder: Path, *, steps: int, seed: int) -> None:
        self.folder = folder
        self.steps = steps
        self.draws = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()

    def run(self, kills: int) -> None:
        """Kill ``kills`` times, and print what was counted."""
        began = time.monotonic()
        children = self.children("whole")
        self.finish(children, self.start(children))
        wanted, rounds = run_contents(self.folder / "whole"), 0
        while self.counts["kills"] < kills:
            rounds += 1
            name = f"victim-{rounds}"
            while not self.attempt(self.children(name), kills):
                self.counts["checkpoints inspected"] += inspect_all(self.folder / name)
            found = run_contents(self.folder / name)
            assert not differing(wanted, found), (
                f"{name} ended otherwise: {differing(wanted, found)}"
            )
            shutil.rmtree(self.folder / name)
            print(f"  {self.counts['kills']} kills in {rounds} runs", flush=True)
        phases = ", ".join(f"{self.counts[kind]} in a {kind}" for kind in PHASES)
        print(
            f"two ranks: {self.counts['kills']} kills of a rank ({phases}) in {rounds} runs of "
            f"{self.steps} iterations; {self.counts['checkpoints inspected']} checkpoints "
            f"inspected after kills, all whole; every other rank ended by itself, after at most "
            f"{self.counts['longest']} s; all {rounds} runs ended bit for bit like the "
            f"uninterrupted one ({len(wanted)} files); {time.monotonic() - began:.0f} s",
            flush=True,
        )

    def attempt(self, children: list[Child], kills: int) -> bool:
        """Start all ranks, and kill one on the way; returns whether the run came to its end."""
        processes = self.start(children)
        if self.counts["kills"] >= kills:
            self.finish(children, processes)
            return True
        kind, victim = self.draws.choice(list(PHASES)), self.draws.randrange(SIZE)
        self.wait_for_phase(children[victim], processes[victim], PHASES[kind])
        time.sleep(self.draws.uniform(0, 0.1))
        phase = children[victim].current_phase()
        if not kill(processes[victim]):
            self.finish(children, processes)
            return True
        self.counts["kills"] += 1
        for name, beginnings in PHASES.items():
            self.counts[name] += phase.partition(" ")[2].startswith(beginnings)
        self.survive(children, processes, victim)
        return False

    def survive(self, children: list[Child], processes: list[BaseProcess], victim: int) -> None:
        """See the other rank end with an error of its own."""
        began = time.monotonic()
        for rank, process in enumerate(processes):
            if rank != victim:
                status = wait(process, PATIENCE)
                log = children[rank].end_of_log()
                assert status is not None, (
                    f"rank {rank} hangs after rank {victim} was killed:\n{log}"
                )
                assert status > 0, f"rank {rank} ended with {status}:\n{log}"
        self.counts["longest"] = max(self.counts["longest"], round(time.monotonic() - began))

    def wait_for_phase(
        self, child: Child, process: BaseProcess, beginnings: tuple[str, ...]
    ) -> None:
        """Wait until it has entered such a phase a number of times."""
        seen: set[str] = set()
        wanted = self.draws.randint(1, 4)
        while process.is_alive() and len(seen) < wanted:
            phase = child.current_phase()
            if phase.partition(" ")[2].startswith(beginnings):
                seen.add(phase.partition(" ")[0])
            time.sleep(0.0005)

    def start(self, children: list[Child]) -> list[BaseProcess]:
        """Start all ranks."""
        for child in children:
            child.phase.unlink(missing_ok=True)
        return [child.start() for child in children]

    def finish(self, children: list[Child], processes: list[BaseProcess]) -> None:
        """See all ranks end well."""
        for child, process in zip(children, processes, strict=True):
            process.join()
            assert process.exitcode == 0, f"{child.log} failed by itself:\n{child.end_of_log()}"

    def children(self, name: str) -> list[Child]:
        """The app of each rank, with a store of its own."""
        file = self.folder / f"{name}.yaml"
        if not file.exists():
            run_files.write(file, run_files.two_ranks(self.folder / name, self.steps))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [
            Child(
                app="train",
                arguments=("--config", str(file)),
                log=self.folder / f"{name}-{rank}.log",
                phase=self.folder / f"{name}-{rank}.phase",
                environment={
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE),
                    "LOCAL_WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
            )
            for rank in range(SIZE)
        ]  # fmt: skip
