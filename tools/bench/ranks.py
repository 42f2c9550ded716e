"""What one process of several holds of a training state: FSDP2 on two against one process.

    uv run python tools/bench/ranks.py [--parameters 200000000] [--repeats 3] [--strategies fsdp2]

The state is fp32 weights, gradients, AdamW moments and an EMA, of a stack of blocks that is built
on meta and filled part by part, so that loading does not count (tools/bench/loading.py). Numbers
are anonymous memory of a process (RssAnon) above what it had before the model, in MB: as gradients
are whole (before the optimizer steps), after a step, and the highest that a thread saw. Of several
processes, the largest counts. One and several take turns; each pair is a line, and medians come
last.

--mmap sets glibc's MALLOC_MMAP_THRESHOLD_ for all of them; 0 leaves it. Without it glibc keeps what
gathered blocks were in, and a process of FSDP2 on a CPU appears as large as one alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from distill_protocols import (
    Callback,
    ModelBundle,
    RandomStreams,
    RoleHandle,
    RunState,
    StepRecord,
    StepResult,
)
from distill_runtime import DistillMethod
from distill_trainer import (
    DistillTrainer,
    DistributedConfig,
    Distribution,
    EmaCallback,
    EmaConfig,
    OptimizerConfig,
    TrainingConfig,
    build_optimizers,
)
from distill_trainer.distribution.tensors import local_shard
from torch import Tensor, nn

WIDTH = 1024
STEPS = 3
MB = 1e6


class Block(nn.Module):
    """Four matrices, as a small transformer block has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Stack(nn.Module):
    def __init__(self, parameters: int) -> None:
        super().__init__()
        count = round(parameters / (4 * WIDTH * (WIDTH + 1)))
        self.blocks = nn.ModuleList([Block() for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Regression(DistillMethod[None]):
    """Small batches: nearly all of the memory is state."""

    def single_train_step(self, batch: Tensor, iteration: int) -> StepResult:
        noise = self.streams.rows("noise", len(batch)).normal((WIDTH,))
        out = self.bundle["student"].modules["net"](noise)
        return StepResult({"total_loss": (out - batch).square().mean()}, {})

    def get_optimizers(self, iteration: int) -> dict[str, torch.optim.Optimizer]:
        return self.optimizers_of("student")


class Memory(Callback):
    """Measures memory where its contents are known: with full gradients, and after a step."""

    name = "memory"

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self.base = 0.0

    def on_before_optimizer_step(self, run: RunState) -> None:
        self.found["with gradients"] = anonymous() - self.base

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        self.found["after a step"] = anonymous() - self.base


def anonymous() -> float:
    """MB of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return float(line.split()[1]) * 1024 / MB
    raise RuntimeError("/proc/self/status has no RssAnon on this system")


def run_worker(strategy: str, parameters: int, report: Path) -> None:
    """Run on each process."""
    torch.set_num_threads(1)
    memory, highest, over = Memory(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            highest[0] = max(highest[0], anonymous())

    config = DistributedConfig(strategy=strategy)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder, Distribution.start(config, "cpu") as here:
        warm(here, folder)
        memory.base = anonymous()
        thread = threading.Thread(target=watch)
        thread.start()
        count = run(here, parameters, folder, STEPS, memory)
        over.set()
        thread.join()
        result = {"parameters": count, **memory.found, "highest": highest[0] - memory.base}
        (report / f"{here.ranks.rank}.json").write_text(json.dumps(result))


def warm(here: Distribution, folder: str) -> None:
    """Import libraries and fill their buffers before anything is measured."""
    run(here, 8 * WIDTH * WIDTH, folder, 2, Memory())


def run(here: Distribution, parameters: int, folder: str, steps: int, memory: Memory) -> int:
    with torch.device("meta"):
        net = Stack(parameters)
    blocks = tuple(f"blocks.{i}" for i in range(len(net.blocks)))
    role = RoleHandle(name="student", modules={"net": net}, trainable=True, blocks={"net": blocks})
    here.shard(role)
    net.to_empty(device="cpu")
    streams = RandomStreams(0, rank=here.ranks.rank, world_size=here.ranks.size)
    with torch.no_grad():
        for parameter in net.parameters():
            local_shard(parameter).normal_(0, 0.01, generator=streams.get("weights"))
    build_optimizers(role, OptimizerConfig(lr=1e-4), horizon=steps)
    training = TrainingConfig(
        output_dir=folder, max_train_steps=steps, global_batch_size=4, progress=False, trackers=()
    )
    method = Regression(ModelBundle({"student": role}), None, streams=streams)
    ema = EmaCallback(EmaConfig(roles=("student",)))
    trainer = DistillTrainer(training, callbacks=[ema, memory], distribution=here)
    trainer.run(method, [torch.zeros(4 // here.ranks.size, WIDTH)])
    return sum(parameter.numel() for parameter in net.parameters())


def measure(strategy: str, processes: int, parameters: int, mmap: int) -> dict[str, float]:
    """Return the numbers of the process that holds most."""
    with tempfile.TemporaryDirectory() as report:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={processes}", __file__, "--worker", strategy,
            f"--parameters={parameters}", f"--report={report}",
        ]  # fmt: skip
        variables = {"MALLOC_MMAP_THRESHOLD_": str(mmap)} if mmap else {}
        subprocess.run(command, check=True, env={**os.environ, **variables})
        found: list[dict[str, Any]] = [
            json.loads(path.read_text()) for path in Path(report).iterdir()
        ]
    assert len(found) == processes
    return {key: max(float(each[key]) for each in found) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--parameters", type=int, default=200_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", default=["fsdp2"])
    parser.add_argument("--mmap", type=int, default=2**18)
    parser.add_argument("--worker")
    parser.add_argument("--report", type=Path)
    given = parser.parse_args()
    if given.worker:
        run_worker(given.worker, given.parameters, given.report)
        return
    for strategy in given.strategies:
        pairs = []
        for number in range(given.repeats):
            one = measure("none", 1, given.parameters, given.mmap)
            many = measure(strategy, given.processes, given.parameters, given.mmap)
            pairs.append({key: (one[key], many[key]) for key in one if key != "parameters"})
            changes = ", ".join(f"{k} {a:.0f} -> {b:.0f} MB" for k, (a, b) in pairs[-1].items())
            print(f"pair {number + 1}, {one['parameters'] / 1e6:.0f}M parameters: {changes}")
        for key in pairs[0]:
            ratios = [many / one for one, many in (pair[key] for pair in pairs)]
            print(
                f"{strategy} on {given.processes} / one process, {key}: "
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            )


if __name__ == "__main__":
    main()
