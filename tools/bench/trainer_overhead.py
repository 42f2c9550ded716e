"""What DistillTrainer costs over a bare PyTorch loop of the same maths.

    uv run python tools/bench/trainer_overhead.py [--repeats 4] [--steps 100]

Both loops train the same transformer on the same flow-matching batches with the same clipping,
average, schedule and logging; at the end their weights must be equal bit for bit, or the
comparison means nothing. They run in one process and take turns iteration by iteration, so that a
busy box slows both alike; what is compared is the CPU time of the same ten iterations (one log
point) on either side.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from distill_protocols import ModelBundle, RandomStreams, RoleHandle, StepResult
from distill_runtime import DistillMethod
from distill_trainer import (
    DistillTrainer,
    EmaCallback,
    EmaConfig,
    GradClipCallback,
    GradClipConfig,
    OptimizerConfig,
    TrainingConfig,
    build_optimizers,
)
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.tensorboard.writer import SummaryWriter

LAYERS = (2, 4, 8)
WIDTH, HEADS, FFN, CHANNELS, TOKENS, TEXT = 128, 4, 384, 32, 12, 16  # tiny Wan: 8 x 2 x 2 a token
BATCH, LOG_EVERY, LR, MAX_NORM, DECAY = 16, 10, 1e-4, 1.0, 0.99

Sample = tuple[Tensor, Tensor]
"""Clean tokens [B, N, C] and text [B, L, D]."""


class Velocity(nn.Module):
    """A transformer with the shape of the tiny Wan."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, WIDTH)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(WIDTH, HEADS, FFN, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.out = nn.Linear(WIDTH, CHANNELS)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        hidden = self.embed(x) + self.time(t[:, None, None] / 1000)
        for block in self.blocks:
            hidden = block(hidden, text)
        return self.out(hidden)


def flow_loss(model: nn.Module, batch: Sample, generator: torch.Generator) -> Tensor:
    """Mean squared error on v = eps - x0 at uniform sigma."""
    x0, text = batch
    sigma = torch.rand(len(x0), generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    s = sigma[:, None, None]
    v = model((1 - s) * x0 + s * eps, sigma * 1000, text)
    return (v - (eps - x0)).square().mean()


class Finetune(DistillMethod[None]):
    """The method as a user writes it."""

    def single_train_step(self, batch: Sample, iteration: int) -> StepResult:
        generator = self.streams.get("noise")
        loss = flow_loss(self.bundle["student"].modules["net"], batch, generator)
        return StepResult({"total_loss": loss}, {})

    def get_optimizers(self, iteration: int) -> dict[str, torch.optim.Optimizer]:
        return self.optimizers_of("student")


class Turns:
    """Lets two loops run iteration by iteration in turns, and times each iteration.

    A loop gets its batches from ``batches(side)``, and asking for one ends its turn.
    """

    def __init__(self, data: list[Sample], steps: int) -> None:
        self.seconds: tuple[list[float], list[float]] = ([], [])
        self._data = data
        self._steps = steps
        self._go = (threading.Semaphore(1), threading.Semaphore(0))

    def batches(self, side: int) -> Iterator[Sample]:
        for step in range(self._steps):
            self._go[side].acquire()
            start = time.process_time()
            yield self._data[step % len(self._data)]
            self.seconds[side].append(time.process_time() - start)
            self._go[1 - side].release()

    def leave(self, side: int) -> None:
        """End this loop, so that the other one no longer waits for it."""
        self._go[1 - side].release(self._steps)


def with_trainer(model: nn.Module, batches: Iterator[Sample], steps: int, folder: Path) -> None:
    """Run the loop of this package, with the callbacks that a normal user has."""
    role = RoleHandle(name="student", modules={"net": model}, trainable=True)
    training = TrainingConfig(
        output_dir=str(folder),
        max_train_steps=steps,
        optimizer=OptimizerConfig(lr=LR),
        log_every=LOG_EVERY,
        progress=False,
    )
    build_optimizers(role, training.optimizer, horizon=steps)
    method = Finetune(ModelBundle({"student": role}), None, streams=RandomStreams(0))
    callbacks = [
        EmaCallback(EmaConfig(roles=("student",), decay=DECAY)),
        GradClipCallback(GradClipConfig(max_norm=MAX_NORM)),
    ]
    DistillTrainer(training, callbacks=callbacks).run(method, batches)


def bare(model: nn.Module, batches: Iterator[Sample], steps: int, folder: Path) -> None:
    """Run a loop written by hand, with care."""
    generator = RandomStreams(0).get("noise")
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    average = [parameter.detach().clone() for parameter in parameters]
    writer = SummaryWriter(str(folder / "tensorboard"))
    losses, norms = [], []
    with (folder / "metrics.jsonl").open("a", buffering=1) as lines:
        for step, batch in enumerate(batches, start=1):
            loss = flow_loss(model, batch, generator)
            if not math.isfinite(loss.item()):
                raise SystemExit("not finite")
            loss.backward()
            norm = get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
            clip_grads_with_norm_(parameters, MAX_NORM, norm, foreach=True)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - DECAY)
            losses.append(loss.detach())
            norms.append(norm)
            if step % LOG_EVERY == 0:
                values = {
                    "loss/total_loss": torch.stack(losses).mean().item(),
                    "grad_norm/student.net": torch.stack(norms).mean().item(),
                    "lr/student.net": scheduler.get_last_lr()[0],
                    "updates/student.net": step,
                }
                losses, norms = [], []
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
                lines.write(json.dumps({"iteration": step, "time": time.time(), **values}) + "\n")
    writer.close()


def race(layers: int, steps: int, trainer_side: int) -> list[tuple[float, float]]:
    """CPU seconds (trainer, bare) of each ten iterations but the first ten."""
    torch.manual_seed(layers)
    model = Velocity(layers)
    draw = torch.Generator().manual_seed(1)
    data = [
        (
            torch.randn(BATCH, TOKENS, CHANNELS, generator=draw),
            torch.randn(BATCH, TEXT, WIDTH, generator=draw),
        )
        for _ in range(8)
    ]
    turns = Turns(data, steps)
    models = [copy.deepcopy(model), copy.deepcopy(model)]
    loops = [with_trainer, bare] if trainer_side == 0 else [bare, with_trainer]

    def run(side: int, folder: str) -> None:
        try:
            loops[side](models[side], turns.batches(side), steps, Path(folder))
        finally:
            turns.leave(side)

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        threads = [threading.Thread(target=run, args=pair) for pair in ((0, one), (1, two))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    states = [m.state_dict() for m in models]
    if not all(torch.equal(states[0][key], states[1][key]) for key in states[0]):
        raise SystemExit("the two loops ended with different weights: they are not the same maths")
    # The first ten open files and allocate moments; the last one's end is not seen by Turns.
    windows = range(LOG_EVERY, steps - LOG_EVERY, LOG_EVERY)
    sums = [[sum(seconds[w : w + LOG_EVERY]) for w in windows] for seconds in turns.seconds]
    return list(zip(sums[trainer_side], sums[1 - trainer_side], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=4, help="races for each model")
    parser.add_argument("--steps", type=int, default=100, help="iterations of a race, at least 40")
    args = parser.parse_args()
    if args.steps < 40:
        parser.error(f"--steps {args.steps}: at least 40, or no ratio has a spread")
    torch.set_num_threads(1)
    print(f"{args.repeats} races of {args.steps} iterations, CPU time, 1 thread, batch {BATCH}")
    print(
        f"{'layers':>6} {'parameters':>10} {'bare ms':>8} {'trainer ms':>10} "
        f"{'ratio':>6} {'quartiles':>13} {'min..max':>13}"
    )
    for layers in LAYERS:
        race(layers, 2 * LOG_EVERY, 0)  # first calls of kernels and imports are nobody's
        windows = [w for i in range(args.repeats) for w in race(layers, args.steps, i % 2)]
        ratios = sorted(ours / bare_ for ours, bare_ in windows)
        low, middle, high = statistics.quantiles(ratios, n=4)
        ours, theirs = (
            1000 * statistics.median(window[side] for window in windows) / LOG_EVERY
            for side in (0, 1)
        )
        print(
            f"{layers:>6} {sum(p.numel() for p in Velocity(layers).parameters()):>10,} "
            f"{theirs:>8.2f} {ours:>10.2f} {middle:>6.3f} "
            f"{low:>6.3f}-{high:.3f} {ratios[0]:>6.3f}-{ratios[-1]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
