"""What DistillTrainer costs over a bare PyTorch loop of the same maths.

    uv run python tools/bench/trainer_overhead.py [--repeats 15] [--steps 40]

Both loops train the same transformer on the same flow-matching batches with the same clipping,
average, schedule and logging; at the end their weights must be equal bit for bit, or the
comparison means nothing. They run in pairs within one process, in turns first and second, on CPU
time, so that neither a busy box nor a warming cache takes sides.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from distill_protocols import DistillMethod, ModelBundle, RandomStreams, RoleHandle, StepResult
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


def with_trainer(model: nn.Module, batches: list[Sample], steps: int, folder: Path) -> float:
    """CPU seconds of a run."""
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
        EmaCallback(EmaConfig(decay=DECAY)),
        GradClipCallback(GradClipConfig(max_norm=MAX_NORM)),
    ]
    start = time.process_time()
    DistillTrainer(training, callbacks=callbacks).run(method, batches)
    return time.process_time() - start


def bare(model: nn.Module, batches: list[Sample], steps: int, folder: Path) -> float:
    """CPU seconds of a loop written by hand."""
    generator = RandomStreams(0).get("noise")
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    start = time.process_time()
    average = [parameter.detach().clone() for parameter in parameters]
    writer = SummaryWriter(str(folder / "tensorboard"))
    losses, norms = [], []
    with (folder / "metrics.jsonl").open("a", buffering=1) as lines:
        for step in range(1, steps + 1):
            loss = flow_loss(model, batches[(step - 1) % len(batches)], generator)
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
    return time.process_time() - start


def pair(layers: int, steps: int, trainer_first: bool) -> dict[str, float]:
    """CPU seconds of both loops from the same weights."""
    torch.manual_seed(layers)
    model = Velocity(layers)
    draw = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randn(BATCH, TOKENS, CHANNELS, generator=draw),
            torch.randn(BATCH, TEXT, WIDTH, generator=draw),
        )
        for _ in range(8)
    ]
    sides: dict[str, Any] = {"trainer": with_trainer, "bare": bare}
    models = {name: copy.deepcopy(model) for name in sides}
    seconds: dict[str, float] = {}
    for name in sorted(sides, reverse=trainer_first):
        with tempfile.TemporaryDirectory() as folder:
            gc.collect()
            seconds[name] = sides[name](models[name], batches, steps, Path(folder))
    states = [m.state_dict() for m in models.values()]
    if not all(torch.equal(states[0][key], states[1][key]) for key in states[0]):
        raise SystemExit("the two loops ended with different weights: they are not the same maths")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="pairs of runs for each model")
    parser.add_argument("--steps", type=int, default=40, help="iterations of a run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.repeats} pairs of {args.steps} iterations, CPU time, 1 thread, batch {BATCH}")
    print(
        f"{'layers':>6} {'parameters':>10} {'bare ms':>8} {'trainer ms':>10} "
        f"{'ratio':>6} {'quartiles':>13} {'min..max':>13}"
    )
    for layers in LAYERS:
        pair(layers, 4, True)  # first calls of kernels and imports are nobody's
        runs = [pair(layers, args.steps, i % 2 == 0) for i in range(args.repeats)]
        ratios = sorted(run["trainer"] / run["bare"] for run in runs)
        low, middle, high = statistics.quantiles(ratios, n=4)
        each = {
            name: 1000 * statistics.median(run[name] for run in runs) / args.steps
            for name in ("bare", "trainer")
        }
        print(
            f"{layers:>6} {sum(p.numel() for p in Velocity(layers).parameters()):>10,} "
            f"{each['bare']:>8.2f} {each['trainer']:>10.2f} {middle:>6.3f} "
            f"{low:>6.3f}-{high:.3f} {ratios[0]:>6.3f}-{ratios[-1]:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
