"""``apps/trajectories`` and ``apps/export``, killed half way and gone on with."""

from __future__ import annotations

import collections
import random
import time
from pathlib import Path

from torture import run_files
from torture.comparison import differing, folder_contents
from torture.processes import Child, kill

SAMPLES = 120


class AppKills:
    """What the apps leave after kills, against what they leave undisturbed."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.folder = folder
        self.draws = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()

    # -- trajectories -------------------------------------------------------------------------

    def trajectories(self, kills: int) -> None:
        """Kill it with some shards written, and see it make the others."""
        whole, began = self.finish(self.trajectories_app("whole")), time.monotonic()
        wanted, rounds = folder_contents(whole), 0
        while self.counts["trajectories"] < kills:
            rounds += 1
            name = f"victim-{rounds}"
            while self.counts["trajectories"] < kills and self.kill_within_shards(name):
                pass
            found = folder_contents(self.finish(self.trajectories_app(name)))
            assert not differing(wanted, found), f"{name}: {differing(wanted, found)}"
        print(
            f"trajectories: {self.counts['trajectories']} kills in {rounds} data sets of {SAMPLES} "
            f"clips ({self.counts['with shards']} with some shards there), which ended byte for "
            f"byte like the undisturbed one ({len(wanted)} files); "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )

    def kill_within_shards(self, name: str) -> bool:
        """Start it and kill it after a few shards; returns whether it was killed."""
        out = self.folder / name
        before = len(list(out.glob("shard-*")))
        process, more = self.trajectories_app(name).start(), self.draws.randint(0, 3)
        while process.is_alive() and len(list(out.glob("shard-*"))) < before + more:
            time.sleep(0.001)
        time.sleep(self.draws.uniform(0, 0.4 if more else 3.0))
        if not kill(process):
            return False
        self.counts["trajectories"] += 1
        self.counts["with shards"] += bool(list(out.glob("shard-*")))
        return True

    def trajectories_app(self, name: str) -> Child:
        """The app with a folder of its own."""
        file = self.folder / f"{name}.yaml"
        if not file.exists():
            run_files.write(file, run_files.trajectories(self.folder / name, SAMPLES))
        return self.app("trajectories", name, "--config", str(file))

    # -- export -------------------------------------------------------------------------------

    def exports(self, kills: int) -> None:
        """Kill it while it writes over an older export, which stays or is replaced whole."""
        began, run = time.monotonic(), self.folder / "run"
        values = run_files.shipped(run, 4)
        file = run_files.write(self.folder / "run.yaml", values)
        self.finish(self.app("train", "run", "--config", str(file)))
        checkpoints = [run / f"checkpoint-00000{i}" for i in (2, 4)]
        wanted = [
            folder_contents(self.finish(self.export_app(checkpoint, f"at-{i}/student")))
            for i, checkpoint in enumerate(checkpoints)
        ]
        target = self.folder / "at" / "student"
        while self.counts["export"] < kills:
            newer = self.draws.randrange(2)
            app = self.export_app(checkpoints[newer], "at/student")
            if self.kill_while_it_writes(app, target):
                found = folder_contents(target) if target.exists() else None
                assert found is None or found in wanted, f"{target} is torn: {sorted(found)}"
                self.counts["none or as before"] += found != wanted[newer]
            if self.draws.random() < 0.3:
                self.finish(self.export_app(checkpoints[newer], "at/student", "--verify"))
                assert not differing(wanted[newer], folder_contents(target))
                left = [p.name for p in target.parent.iterdir() if p.name != target.name]
                assert not left, f"killed exports left {left}, and nobody removes them"
                self.counts["gone on with"] += 1
        print(
            f"export: {self.counts['export']} kills over an older export; "
            f"{self.counts['none or as before']} left it as it was, none half; "
            f"{self.counts['gone on with']} times gone on with, byte for byte like the undisturbed "
            f"one ({len(wanted[0])} files), nothing left beside it; "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )

    def kill_while_it_writes(self, app: Child, target: Path) -> bool:
        """Start it and kill it when its staging folder has been there a little."""
        process, parent = app.start(), target.parent
        before = set(parent.glob(".student.*"))
        while process.is_alive() and not set(parent.glob(".student.*")) - before:
            time.sleep(0.0005)
        time.sleep(self.draws.uniform(0, 0.15))
        killed = kill(process)
        self.counts["export"] += killed
        return killed

    def export_app(self, checkpoint: Path, to: str, *options: str) -> Child:
        """The app with one checkpoint and one folder."""
        return self.app(
            "export", to, "--checkpoint", str(checkpoint), "--role", "student",
            "--to", str(self.folder / to), *options,
        )  # fmt: skip

    # -- both ---------------------------------------------------------------------------------

    def app(self, app: str, name: str, *arguments: str) -> Child:
        """An app that writes the folder ``name``."""
        flat = name.replace("/", "-")
        return Child(
            app=app,
            arguments=arguments,
            log=self.folder / f"{flat}.log",
            phase=self.folder / f"{flat}.phase",
        )

    def finish(self, app: Child) -> Path:
        """See it end well; returns the folder that it writes."""
        process = app.start()
        process.join()
        assert process.exitcode == 0, f"{app.arguments} failed:\n{app.end_of_log()}"
        if app.app == "export":
            return Path(app.arguments[app.arguments.index("--to") + 1])
        return self.folder / app.log.stem
