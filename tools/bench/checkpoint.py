"""What a checkpoint costs: against raw safetensors, in iterations, and in memory.

    uv run python tools/bench/checkpoint.py [--parameters 200000000] [--repeats 5] [--folder DIR]

1. Save and load of a role set (weights, AdamW moments, EMA) against writing and reading the same
   bytes with safetensors, in turns in one process; medians and spread. What fsync and sha256 take
   of it is measured on the same files.
2. How many iterations a save holds up the training, synchronous and asynchronous.
3. Peak memory of a run that saves, and of a fresh process that resumes it and goes on: anonymous
   pages (what the process allocates) and mapped file pages (what the system may take back) apart.

A machine that others use too is noisy: compare numbers of one line.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from distill_checkpoint import ChangesConfig, CheckpointConfig, CheckpointManager
from distill_checkpoint.snapshot import capture
from distill_protocols import (
    Callback,
    ModelBundle,
    RandomStreams,
    RoleHandle,
    RunState,
    StepRecord,
    StepResult,
)
from distill_runtime import ALONE, DistillMethod, sha256_of_file
from distill_trainer import (
    DistillTrainer,
    EmaCallback,
    EmaConfig,
    OptimizerConfig,
    TrainingConfig,
    build_optimizers,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WIDTH = 1024
MB = 1e6


class Regression(DistillMethod[None]):
    """Small batches through a deep network: nearly all of the memory is state."""

    def single_train_step(self, batch: Tensor, iteration: int) -> StepResult:
        noise = torch.randn(batch.shape, generator=self.streams.get("noise"))
        out = self.bundle["student"].modules["net"](batch + noise)
        return StepResult({"total_loss": (out - batch).square().mean()}, {})

    def get_optimizers(self, iteration: int) -> dict[str, torch.optim.Optimizer]:
        return self.optimizers_of("student")


class Batches:
    """One batch, for ever."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self):
        while True:
            self.given += 1
            yield torch.full((8, WIDTH), 0.1)

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state) -> None:
        self.given = state["given"]


class Times(Callback):
    """Seconds between the ends of iterations, saves included."""

    name = "times"

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.stalls: list[float] = []

    def on_step_start(self, run: RunState) -> None:
        self.ends.append(time.perf_counter())
        if "time/checkpoint" in run.metrics:
            self.stalls.append(float(run.metrics["time/checkpoint"]))


def method_of(parameters: int) -> Regression:
    layers = max(1, round(parameters / (WIDTH * WIDTH)))
    net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    role = RoleHandle(name="student", modules={"net": net}, trainable=True)
    build_optimizers(role, OptimizerConfig(lr=1e-5), horizon=1000)
    return Regression(ModelBundle({"student": role}), None, streams=RandomStreams(0))


def train(
    folder: Path, parameters: int, steps: int, config: CheckpointConfig | None, *watch: Callback
) -> RunState:
    method, loader = method_of(parameters), Batches()
    ema = EmaCallback(EmaConfig(roles=("student",), decay=0.99))
    training = TrainingConfig(
        output_dir=str(folder), max_train_steps=steps, progress=False, trackers=()
    )
    manager = CheckpointManager(config, folder, {}) if config else None
    seen: list[RunState] = []

    class Keep(Callback):
        name = "keep"

        def on_step_end(self, run: RunState, step: StepRecord) -> None:
            seen[:] = [run]

    trainer = DistillTrainer(training, callbacks=[ema, *watch, Keep()], checkpointer=manager)
    trainer.run(method, loader)
    return seen[0]


# -- 1: against raw safetensors -------------------------------------------------------------------


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def write_raw(folder: Path, tensors: dict[str, dict[str, Tensor]], *, fsync: bool) -> None:
    folder.mkdir()
    for number, part in enumerate(tensors.values()):
        path = folder / f"{number}.safetensors"
        save_file(part, path)
        if fsync:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def read_raw(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    for number, part in enumerate(tensors.values()):
        with safe_open(folder / f"{number}.safetensors", framework="pt") as file:
            for name, tensor in part.items():
                tensor.copy_(file.get_tensor(name))


def tensors_of(run: RunState) -> dict[str, dict[str, Tensor]]:
    """Return what a checkpoint of ``run`` holds, by file and name."""
    shards = capture(run, {}, ALONE, ChangesConfig()).by_all_ranks
    return {str(path): dict(shard.local) for path, shard in shards.items()}


def against_raw(root: Path, parameters: int, repeats: int) -> None:
    run = train(root / "train", parameters, 2, None)
    tensors = tensors_of(run)
    size = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
    print(f"1. {parameters:,} parameters: weights, two moments, EMA: {size / MB:,.0f} MB")
    rounds = [one_round(root, run, tensors, turn) for turn in range(repeats + 1)][1:]
    for name in rounds[0]:  # the first one warmed up
        values = sorted(times[name] for times in rounds)
        middle = statistics.median(values)
        print(
            f"   {name:34} {middle:7.2f} s   {values[0]:.2f}-{values[-1]:.2f}   "
            f"{size / MB / middle:8,.0f} MB/s"
        )
    for ours, raw in ((SAVE, "write: raw + fsync"), (LOAD, "read: raw safetensors")):
        ratios = sorted(times[ours] / times[raw] for times in rounds)
        print(
            f"   ({ours}) / ({raw}), paired: {statistics.median(ratios):.2f}, "
            f"{ratios[0]:.2f}-{ratios[-1]:.2f}"
        )


SAVE, LOAD = "write: checkpoint", "read: checkpoint, verified"


def one_round(
    root: Path, run: RunState, tensors: dict[str, dict[str, Tensor]], turn: int
) -> dict[str, float]:
    """Seconds by name. Who is first changes by ``turn``; each starts with nothing to be written."""
    raw, synced, ours = root / "raw", root / "synced", root / "ours"
    manager = CheckpointManager(CheckpointConfig(), ours, {})
    writes: list[tuple[str, Path, Callable[[], object]]] = [
        ("write: raw safetensors", raw, lambda: write_raw(raw, tensors, fsync=False)),
        ("write: raw + fsync", synced, lambda: write_raw(synced, tensors, fsync=True)),
        (SAVE, ours, lambda: manager.save(run, {})),
    ]
    times = {}
    for name, folder, action in writes[turn % 3 :] + writes[: turn % 3]:
        # Just before, so that each gets the pages of its own last round: on a virtual machine
        # pages that were free for a while cost several times as much as the writing.
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        times[name] = seconds(action)
    times = {name: times[name] for name, _, _ in writes}
    files = sorted(ours.rglob("*.safetensors"))
    times["sha256 of the files, one by one"] = seconds(
        lambda: [sha256_of_file(path) for path in files]
    )
    times["read: raw safetensors"] = seconds(lambda: read_raw(raw, tensors))
    again = CheckpointManager(CheckpointConfig(resume="latest"), ours, {})
    times[LOAD] = seconds(lambda: again.resume(run, {}))
    return times


# -- 2: the stall ---------------------------------------------------------------------------------


def stall(root: Path, parameters: int) -> None:
    print(f"2. a save every 8th of 24 iterations, {parameters:,} parameters")
    for in_background in (False, True):
        times = Times()
        config = CheckpointConfig(every_steps=8, async_save=in_background, keep_last=1)
        train(root / f"stall-{in_background}", parameters, 25, config, times)
        steps = [b - a for a, b in zip(times.ends, times.ends[1:], strict=False)]
        alone = statistics.median(steps[i] for i in range(2, 7))
        spread = ", ".join(f"{value:.2f}" for value in times.stalls)
        middle = statistics.median(times.stalls)
        kind = "asynchronous" if in_background else "synchronous"
        print(
            f"   {kind:12} stall {middle:.2f} s ({spread}) = {middle / alone:.1f} iterations "
            f"of {alone:.2f} s"
        )


# -- 3: memory ------------------------------------------------------------------------------------


class Memory(threading.Thread):
    """Peaks of this process's anonymous and file pages, looked at every millisecond, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks = {"RssAnon": 0.0, "RssFile": 0.0}

    def run(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            for key, peak in self.peaks.items():
                match = re.search(rf"{key}:\s+(\d+) kB", status)
                self.peaks[key] = max(peak, int(match[1]) * 1024 / MB if match else 0)
            time.sleep(0.001)


def high_water() -> float:
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 / MB if match else 0.0


def memory_of(folder: Path, parameters: int, steps: int, resume: str) -> None:
    """Train ``steps`` in a process of its own and print the peak memory."""
    torch.set_num_threads(1)
    watch = Memory()
    watch.start()
    time.sleep(0.1)
    before = dict(watch.peaks)
    config = CheckpointConfig(resume=resume)
    train(folder, parameters, steps, config)
    anonymous, mapped = (watch.peaks[key] - before[key] for key in ("RssAnon", "RssFile"))
    print(
        f"anonymous +{anonymous:,.0f} MB, file pages +{mapped:,.0f} MB, "
        f"VmHWM {high_water():,.0f} MB"
    )


def memory(root: Path, parameters: int) -> None:
    print(f"3. peak memory over that of the imports, {parameters:,} parameters")
    state = 4 * parameters * 4 / MB
    print(f"   weights, moments and EMA are {state:,.0f} MB, gradients {state / 4:,.0f} MB")
    folder = root / "memory"
    for name, steps, resume in (("4 steps and a save", 4, "none"), ("resume, 4 more", 8, "latest")):
        what = [str(folder), str(parameters), str(steps), resume]
        result = subprocess.run(
            [sys.executable, __file__, "--memory-of", *what],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        print(f"   {name:20} {result.stdout.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=200_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to write; a disk like the one to know about")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        folder, parameters, steps, resume = args.memory_of
        memory_of(Path(folder), int(parameters), int(steps), resume)
        return
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        against_raw(root, args.parameters, args.repeats)
        stall(root, args.parameters // 4)
        memory(root, args.parameters // 4)


if __name__ == "__main__":
    main()
