"""What the callback `health` costs at its defaults, as a share of the training.

    uv run python tools/bench/health.py [--names dmd2 consistency] [--checks 6]

One process trains the shipped tiny run file and takes the CPU time of everything that health does,
and of everything else: the two alternate, so a busy machine slows both alike. The run is shortened;
what a check and an iteration take is laid over the whole one, with as many checks as it would have.
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
from attrs import define, field
from distill_evaluation.health.callback import HealthCallback
from distill_evaluation.health.config import HealthConfig
from distill_protocols import Callback, RunState, StepRecord
from distill_runfile.read import read_config
from distill_runfile.source import read_source
from distill_runtime import device_type
from distill_train.build import build
from distill_trainer import Distribution

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"


@define
class Times:
    """CPU seconds of each kind of work."""

    start: float = 0.0
    checks: list[float] = field(factory=list)
    other_steps: list[float] = field(factory=list)
    training: list[float] = field(factory=list)


class Timed(Callback):
    """Health in a coat that holds a watch."""

    name = "health"
    only_observes = True

    def __init__(self, health: HealthCallback, every: int) -> None:
        self.health, self.every, self.times = health, every, Times()
        self._left = 0.0

    def on_train_start(self, run: RunState) -> None:
        self.health.on_train_start(run)

    def on_step_start(self, run: RunState) -> None:
        began = time.process_time()
        self.health.on_step_start(run)
        now = time.process_time()
        if run.iteration == 1:
            self.times.start = now - began
        else:
            self.times.other_steps.append(now - began)
        self._left = now

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        began = time.process_time()
        self.times.training.append(began - self._left)
        self.health.on_step_end(run, step)
        is_check = run.iteration % self.every == 0
        column = self.times.checks if is_check else self.times.other_steps
        column.append(time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description="What the callback health costs.")
    parser.add_argument("--names", nargs="+", default=["dmd2", "consistency"])
    parser.add_argument("--checks", type=int, default=6, help="to take times of")
    parser.add_argument("--between", type=int, default=5, help="iterations between two of them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names:
        print(measure(name, args.checks, args.between), flush=True)


def measure(name: str, checks: int, between: int) -> str:
    values: dict[str, Any] | None = read_source(TINY / f"{name}.yaml").values
    assert values is not None, f"{name}.yaml cannot be read"
    whole = values["training"]["max_train_steps"]
    with tempfile.TemporaryDirectory() as folder:
        values["training"] |= {
            "output_dir": f"{folder}/out", "max_train_steps": checks * between + 1,
            "progress": False, "trackers": ["jsonl"],
        }  # fmt: skip
        values["checkpoint"] = {"save_at_end": False}
        values["callbacks"] = {"health": {"every_steps": between}}
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
            timed = Timed(health, between)
            run.trainer.callbacks["health"] = timed
            run.trainer.run(run.method, run.loader)
    times = timed.times
    health.config = HealthConfig()
    interval = health.interval(whole, config.training.global_batch_size)
    step, check, idle = (
        statistics.mean(column) for column in (times.training, times.checks, times.other_steps)
    )
    cost = times.start + whole // interval * check + 2 * whole * idle
    return (
        f"{name}: an iteration {step * 1e3:.0f} ms of CPU time; before the first "
        f"{times.start * 1e3:.0f} ms; a check {check * 1e3:.0f} ms, every {interval} iterations; "
        f"else {idle * 1e6:.0f} us: {cost / (whole * step):.2%} of {whole} iterations"
    )


if __name__ == "__main__":
    main()
