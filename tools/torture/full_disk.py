"""A disk that fills up at some moment of a run, is emptied again, and the run gone on with."""

from __future__ import annotations

import collections
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_runfile.cli import EXIT_STORAGE
from torture import run_files
from torture.comparison import differing, inspect_all, run_contents
from torture.processes import Child, Filling

STEPS = 6
EXPORTS = "save of the end"
MOMENTS: tuple[tuple[str, str, int], ...] = (
    ("start", "start of training", 0),
    ("first save", "save", 2),
    ("middle of the first save", "save", 2),
    ("second save", "save", 4),
    ("middle of a later save", "save", 4),
    ("metrics", "callback 'metrics', on_step_end", 3),
    ("tensorboard", "callback 'metrics', on_step_end", 5),
    ("validation", "callback 'validation', on_step_end", 2),
    ("validation video", "callback 'validation', on_step_end", 4),
    ("save of the end", "save", 6),
    ("export", "callback 'export', on_train_end", 6),
    ("middle of an export", "callback 'export', on_train_end", 6),
    ("report", "callback 'report', on_train_end", 6),
    ("middle of a report", "callback 'report', on_train_end", 6),
    ("forward", "forward and backward", 3),
)
"""What fills up, and the phase and iteration in which it does."""


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own; only root may have one."""
    folder.mkdir()
    options = f"size={megabytes}m"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class FullDisk:
    """One undisturbed run, and one for each moment."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.folder = folder
        self.draws = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()

    def run(self, rounds: int) -> None:
        """Fill the disk at each moment ``rounds`` times, and print what was counted."""
        began = time.monotonic()
        disk = self.folder / "disk"
        with small_disk(disk, 200):
            wanted = {}
            for background in (False, True):
                wanted[background] = self.undisturbed(disk / "whole", background)
            for number in range(rounds * len(MOMENTS)):
                name, phase, iteration = MOMENTS[number % len(MOMENTS)]
                background = self.draws.random() < 0.5
                room = self.room(name, number // len(MOMENTS))
                filling = Filling(
                    phase=phase, iteration=iteration, room=room, file=str(disk / "filler")
                )
                found = self.disturbed(disk / "run", background, filling, name)
                different = differing(wanted[background], found)
                assert not different, f"{name}, {room:,} bytes left: {different}"
                print(f"  {name}, {room:,} bytes left: went on to the same end", flush=True)
        print(
            f"full disk: {self.counts['filled']} times full at {len(MOMENTS)} moments, "
            f"{self.counts['failed']} of them to an end with status {EXIT_STORAGE}, "
            f"{self.counts['passed']} with enough room left; "
            f"{self.counts['checkpoints inspected']} checkpoints inspected, all whole; all went on "
            f"to the end of the undisturbed run, byte for byte ({len(wanted[False])} files); "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )

    def room(self, name: str, number: int) -> int:
        """Bytes that are left: none, or so few that what is written then is cut off."""
        if "middle" in name:
            return self.draws.randrange(20_000, 2_000_000)
        return 0 if number == 0 else self.draws.randrange(0, 40_000)

    def undisturbed(self, out: Path, background: bool) -> dict[str, object]:
        """What a run leaves that has room enough."""
        child = self.child(out, background, None)
        process = child.start()
        process.join()
        assert process.exitcode == 0, child.end_of_log()
        found = run_contents(out)
        shutil.rmtree(out)
        return found

    def disturbed(
        self, out: Path, background: bool, filling: Filling, name: str
    ) -> dict[str, object]:
        """Let the disk fill up, empty it, and give the same command again."""
        child = self.child(out, background, filling)
        child.log.unlink(missing_ok=True)
        process = child.start()
        process.join()
        filler = Path(filling.file)
        assert filler.exists(), f"{name}: {filling.phase!r} never came:\n{child.end_of_log()}"
        self.counts["filled"] += 1
        self.counts["checkpoints inspected"] += inspect_all(out) if out.exists() else 0
        assert process.exitcode in (0, EXIT_STORAGE), (
            f"{name}, {filling.room:,} bytes left: status {process.exitcode}\n{child.end_of_log()}"
        )
        self.counts["failed" if process.exitcode else "passed"] += 1
        assert "Traceback" not in child.end_of_log(), child.end_of_log()
        filler.unlink()
        again = self.child(out, background, None)
        process = again.start()
        process.join()
        assert process.exitcode == 0, f"{name}: {again.end_of_log()}"
        found = run_contents(out)
        shutil.rmtree(out)
        return found

    def child(self, out: Path, background: bool, filling: Filling | None) -> Child:
        """The app, which fills the disk at the moment of ``filling``."""
        values = run_files.everything(out, STEPS, async_save=background)
        file = run_files.write(self.folder / "run.yaml", values)
        return Child(
            app="train",
            arguments=("--config", str(file)),
            log=self.folder / "run.log",
            phase=self.folder / "run.phase",
            filling=filling,
        )
