"""Kill a real run again and again, and see that nothing of it is lost.

    uv run python tools/torture.py [--kills 60] [--seed 0] [--mode sync|async|both] [--lora]

The shipped tiny DMD2 run is started through the app, in a process of its own, and killed by SIGKILL
at random moments: half of them while a save is under way (its staging folder is there), the others
between saves and in start-up. After each kill every checkpoint folder must be whole, byte for byte
against its manifest. Then the same command is given again, which resumes. When the run is complete,
its last checkpoint (weights, averages, optimizers, generators, data position, counters) must equal
that of an uninterrupted run. Runs are started anew until all kills are done.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml
from distill_checkpoint import list_checkpoints
from distill_checkpoint.manifest import inspect

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "tiny"
_CONTEXT = multiprocessing.get_context("forkserver")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="in each mode (default 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--steps", type=int, default=60, help="iterations of one run")
    parser.add_argument("--mode", choices=("sync", "async", "both"), default="both")
    parser.add_argument("--lora", action="store_true", help="student and critic as LoRA roles")
    args = parser.parse_args()
    # Children are forked from a server that has imported what is slow, so that most of a
    # child's life is training and saving. They are processes like any other: a kill is a kill.
    os.environ["HF_HUB_OFFLINE"] = "1"
    _CONTEXT.set_forkserver_preload(["distill_train.run", "diffusers", "torch._dynamo"])
    for mode in ("sync", "async") if args.mode == "both" else (args.mode,):
        with tempfile.TemporaryDirectory() as folder:
            changes = {"async_save": mode == "async"}
            Torture(Path(folder), args.steps, args.seed, changes, args.lora).run(args.kills, mode)
    return 0


class Torture:
    """One uninterrupted run, and others that are killed until all kills are done."""

    def __init__(
        self, folder: Path, steps: int, seed: int, checkpoint: Mapping[str, Any], lora: bool
    ) -> None:
        self.folder = folder
        self.steps = steps
        self.checkpoint = checkpoint
        self.lora = lora
        self.draws = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()

    def run(self, kills: int, mode: str) -> None:
        began = time.monotonic()
        whole = self.start("whole")
        whole.join()
        assert whole.exitcode == 0, f"the uninterrupted run ended with {whole.exitcode}"
        wanted = contents(self.folder / "whole" / f"checkpoint-{self.steps:06d}")
        rounds = 0
        while self.counts["kills"] < kills:
            rounds += 1
            self.victim(f"victim-{rounds}", kills)
            found = contents(self.folder / f"victim-{rounds}" / f"checkpoint-{self.steps:06d}")
            different = sorted(n for n in wanted.keys() | found if wanted.get(n) != found.get(n))
            assert not different, f"round {rounds} ended otherwise: {different}"
            shutil.rmtree(self.folder / f"victim-{rounds}")
        print(
            f"{mode}: {self.counts['kills']} kills in {rounds} runs of {self.steps} iterations; "
            f"{self.counts['in a save']} of them while a save was under way, "
            f"{self.counts['before the first checkpoint']} before the first checkpoint; "
            f"{self.counts['checkpoints inspected']} checkpoints inspected after kills, all whole; "
            f"all {rounds} runs ended bit for bit like the uninterrupted one "
            f"({len(wanted)} files, {sum(map(size_of, wanted.values())) / 1e6:.1f} MB); "
            f"{time.monotonic() - began:.0f} s"
        )

    def victim(self, name: str, kills: int) -> None:
        """One run to its end, killed on the way as often as there are kills left."""
        while True:
            child = self.start(name)
            if self.counts["kills"] < kills:
                self.wait_and_kill(child, self.folder / name)
            child.join()
            if child.exitcode == 0:
                return
            assert child.exitcode == -9, self.log(name)
            self.inspect_all(self.folder / name)

    def wait_and_kill(self, child: BaseProcess, out: Path) -> None:
        """In start-up, within a save, or between two; saves are counted in this child's life."""
        kind = self.draws.choices(("start-up", "save", "anywhere"), (1, 4, 3))[0]
        if kind == "start-up":
            time.sleep(self.draws.uniform(0, 4))
        else:
            for _ in range(self.draws.randint(1, 4)):
                self.wait_for_a_save(child, out, whole=kind == "anywhere")
            time.sleep(self.draws.uniform(0, 0.08 if kind == "save" else 0.8))
        if child.is_alive():
            child.kill()
            child.join()
            if child.exitcode == -9:
                self.counts["kills"] += 1
                self.counts["in a save"] += any(out.glob(".staging-*"))
                self.counts["before the first checkpoint"] += not list_checkpoints(out)

    def wait_for_a_save(self, child: BaseProcess, out: Path, *, whole: bool) -> None:
        """Until a staging folder is there that was not, or (``whole``) a checkpoint."""
        pattern = "checkpoint-*" if whole else ".staging-*"
        before = set(out.glob(pattern))
        while child.is_alive() and not set(out.glob(pattern)) - before:
            before &= set(out.glob(pattern))
            time.sleep(0.0005)

    def inspect_all(self, out: Path) -> None:
        for path in list_checkpoints(out).values():
            damage = inspect(path, checksums=True).damage
            assert damage is None, f"{path}: {damage}"
            self.counts["checkpoints inspected"] += 1

    def start(self, name: str) -> BaseProcess:
        config = self.folder / f"{name}.yaml"
        if not config.exists():
            config.write_text(yaml.safe_dump(self.run_file(name)))
        child = _CONTEXT.Process(target=train, args=(str(config), str(self.log_file(name))))
        child.start()
        return child

    def run_file(self, name: str) -> dict[str, Any]:
        roles: dict[str, dict[str, Any]] = {
            role: {"path": str(TINY / "wan")} for role in ("student", "teacher", "critic")
        }
        if self.lora:
            for role in ("student", "critic"):
                roles[role]["lora"] = {"rank": 4}
        return {
            "recipe": {"family": "wan", "method": "dmd2"},
            "models": roles,
            "training": {
                "output_dir": str(self.folder / name),
                "max_train_steps": self.steps,
                "global_batch_size": 4,
                "batch_size_per_device": 2,
                "cpu_threads": 1,
                "progress": False,
                "trackers": [],
                "optimizer": {"lr": 1e-3, "schedule": {"name": "cosine"}},
            },
            "data": {"path": str(TINY / "data")},
            "pipeline_config": {
                "num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8,
            },
            "method_config": {
                "rollout": "simulate",
                "generator_update_interval": 2,
                "real_score_guidance_scale": 1.5,
                "student_sampler": {"steps": 2, "timesteps": [1000, 700], "stochastic": True},
            },
            "checkpoint": {"every_steps": 2, "resume": "latest", **self.checkpoint},
            "callbacks": {"ema": {"roles": ["student"], "decay": 0.9}, "grad_clip": {}},
        }  # fmt: skip

    def log_file(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def log(self, name: str) -> str:
        return f"{name} failed by itself:\n{self.log_file(name).read_text()[-2000:]}"


def train(config: str, log: str) -> None:
    """The app, in a child."""
    from distill_train.cli import main as app

    with Path(log).open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.exit(app(["--config", config]))


def contents(checkpoint: Path) -> dict[str, Any]:
    """Every file by name: safetensors as their tensors (their header's order is free), JSON as it
    is; not the run file, which names the output folder."""
    from safetensors.numpy import load_file

    files: dict[str, Any] = {}
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if path.suffix == ".safetensors":
            files[name] = {k: v.tobytes() for k, v in load_file(path).items()}
        elif path.is_file() and name not in ("manifest.json", "config.json"):
            files[name] = json.loads(path.read_text())
    return files


def size_of(value: Any) -> int:
    if isinstance(value, dict) and all(isinstance(v, bytes) for v in value.values()):
        return sum(map(len, value.values()))
    return len(json.dumps(value))


if __name__ == "__main__":
    raise SystemExit(main())
