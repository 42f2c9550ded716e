"""What the callback `health` costs at its defaults, as a share of the training.

    uv run python tools/bench/health.py [--names dmd2 consistency] [--runs 1]

One process trains the shipped tiny run file and lets health watch every other stretch between two
checks, in the order on, off, off, on: so a busy machine, and a run that becomes slower or faster,
meet both alike. Each pair of stretches gives a ratio of their CPU times, and all of them (of
several runs, where one has few checks) a mean with its standard error. What health does before the
first update is timed by itself, and laid over the run once.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from attrs import frozen
from distill_evaluation.health.callback import HealthCallback
from distill_protocols import Callback, RunState, StepRecord
from distill_runfile.read import read_config
from distill_runfile.source import read_source
from distill_runtime import device_type
from distill_train.build import build
from distill_trainer import Distribution

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"


class Toggled(Callback):
    """Health, in the stretches in which it is on; takes the CPU seconds of each stretch.

    Args:
        every: iterations of a stretch, at whose end there is a check.
    """

    name = "health"
    only_observes = True

    def __init__(self, health: HealthCallback, every: int) -> None:
        self._health, self._every = health, every
        self.start = 0.0
        self.on: list[float] = []
        self.off: list[float] = []
        self._began = 0.0

    def on_train_start(self, run: RunState) -> None:
        self._health.on_train_start(run)

    def on_step_start(self, run: RunState) -> None:
        now = time.process_time()
        if run.iteration == 1:
            self._health.on_step_start(run)
            self.start = time.process_time() - now
            now += self.start
        if run.iteration % self._every == 1:
            self._began = now
        if run.iteration > 1 and self._is_on(run):
            self._health.on_step_start(run)

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if self._is_on(run):
            self._health.on_step_end(run, step)
        if run.iteration % self._every == 0:
            column = self.on if self._is_on(run) else self.off
            column.append(time.process_time() - self._began)

    def _is_on(self, run: RunState) -> bool:
        return (run.iteration - 1) // self._every % 4 in (0, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the callback health costs.")
    parser.add_argument("--names", nargs="+", default=["dmd2", "consistency"])
    parser.add_argument("--runs", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names:
        print(describe(name, [measure(name) for _ in range(args.runs)]), flush=True)


@frozen(kw_only=True)
class Timed:
    """CPU seconds of a run.

    Attributes:
        pairs: of stretches with and without health.
        start: of what comes before the first update.
    """

    steps: int
    every: int
    pairs: tuple[tuple[float, float], ...]
    start: float


def describe(name: str, runs: list[Timed]) -> str:
    ratios = [on / off - 1 for run in runs for on, off in run.pairs]
    steps, every = runs[0].steps, runs[0].every
    checks = steps // every
    stretch = statistics.median(off for run in runs for _, off in run.pairs)
    start = statistics.median(run.start for run in runs)
    before = start / (checks * stretch)
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
    each = ", ".join(f"{ratio:.1%}" for ratio in sorted(ratios))
    middle = statistics.median(ratios)
    return (
        f"{name}: {checks} checks in {steps} iterations, one every {every}; a stretch takes "
        f"{stretch:.3g} s of CPU time without; with it {statistics.mean(ratios):.2%} more "
        f"(standard error {error:.2%}, median {middle:.2%}; {len(ratios)} pairs: "
        f"{each}); before the first update {start:.2g} s, {before:.2%} of the run: "
        f"{statistics.mean(ratios) + before:.2%} in all"
    )


def measure(name: str) -> Timed:
    values: dict[str, Any] | None = read_source(TINY / f"{name}.yaml").values
    assert values is not None, f"{name}.yaml cannot be read"
    with tempfile.TemporaryDirectory() as folder:
        values["training"] |= {
            "output_dir": f"{folder}/out", "progress": False, "trackers": ["jsonl"],
        }  # fmt: skip
        values["checkpoint"] = {"every_steps": None, "save_at_end": False}
        values["callbacks"] = {"health": {}, "page": None}
        values.pop("validation", None)
        for role in values["models"].values():
            role["path"] = str(TINY / "wan")
            role.pop("init_from", None)
        values["data"]["path"] = str((TINY / values["data"]["path"]).resolve())
        file = Path(folder, "run.yaml")
        file.write_text(yaml.safe_dump(values))
        config = read_config(file)
        with Distribution.start(config.training.distributed, device_type()) as distribution:
            run = build(config, distribution=distribution)
            health = run.trainer.callbacks["health"]
            assert isinstance(health, HealthCallback)
            training = config.training
            steps = training.max_train_steps
            every = health.interval(steps, training.global_batch_size)
            toggled = Toggled(health, every)
            run.trainer.callbacks["health"] = toggled
            run.trainer.run(run.method, run.loader)
    pairs = tuple(zip(toggled.on, toggled.off, strict=False))
    return Timed(steps=steps, every=every, pairs=pairs, start=toggled.start)


if __name__ == "__main__":
    main()
