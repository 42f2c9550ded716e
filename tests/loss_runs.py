"""Small runs of methods with several losses. Importable by forked processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from distill_protocols import Callback, ModelBundle, RunState, StepResult
from distill_runtime import DistillMethod
from distill_trainer import DistillTrainer, OptimizerConfig, build_optimizers
from torch import Tensor
from torch.optim import Optimizer
from toy_trainer import Recorder, batches, linear_role, own_streams, training

WEIGHTS = {"fit_loss": 1.0, "size_loss": 3.0, "critic_loss": 0.5}


class SeveralLosses(DistillMethod[None]):
    """Two losses of the student, one of them of both roles, and one of the critic alone; and one
    that the total does not have."""

    required_roles = ("student", "critic")

    def single_train_step(self, batch: Tensor, iteration: int) -> StepResult:
        student, critic = (self.bundle[n].modules["net"] for n in ("student", "critic"))
        out = student(batch)
        losses = {
            "fit_loss": (out - batch.flip(1)).square().mean(),
            "size_loss": critic(out).square().mean(),
            "critic_loss": critic(batch).abs().mean(),
        }
        total = torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum()
        return StepResult({"total_loss": total, **losses, "watched_loss": out.mean()}, {})

    def get_optimizers(self, iteration: int) -> dict[str, Optimizer]:
        return self.optimizers_of("student", "critic")


class OneLossEach(SeveralLosses):
    """Nothing is shared."""

    def single_train_step(self, batch: Tensor, iteration: int) -> StepResult:
        student, critic = (self.bundle[n].modules["net"] for n in ("student", "critic"))
        losses = {
            "fit_loss": (student(batch) - batch.flip(1)).square().mean(),
            "critic_loss": critic(batch).abs().mean(),
        }
        return StepResult({"total_loss": sum(losses.values()), **losses}, {})  # type: ignore[dict-item]


def build(kind: type[SeveralLosses] = SeveralLosses) -> SeveralLosses:
    roles = {n: linear_role(n, seed=i) for i, n in enumerate(("student", "critic"))}
    for role in roles.values():
        build_optimizers(role, OptimizerConfig(lr=0.01), horizon=9)
    return kind(ModelBundle(roles), None, streams=own_streams())


class Asks(Callback):
    name = "asks"
    only_observes = True

    def on_step_start(self, run: RunState) -> None:
        run.measure_losses = run.iteration % 2 == 1


def train(
    folder: Path,
    *others: Callback,
    kind: type[SeveralLosses] = SeveralLosses,
    steps: int = 3,
    samples: int = 4,
) -> dict[str, Any]:
    method, recorder = build(kind), Recorder()
    config = training(folder, steps, global_batch_size=samples, batch_size_per_device=2)
    DistillTrainer(config, callbacks=[*others, recorder]).run(method, batches())
    return {
        "weights": {
            f"{key}.{name}": value.numpy().copy()
            for key, module in method.model_dict.items()
            for name, value in module.state_dict().items()
        },
        "measured": [
            {
                name.removeprefix("loss_grad_norm/"): float(value)
                for name, value in record.metrics.items()
                if name.startswith("loss_grad_norm/")
            }
            for record in recorder.records
        ],
        "norms": [
            {n: float(v) for n, v in record.metrics.items() if n.startswith("grad_norm/")}
            for record in recorder.records
        ],
    }


def train_and_ask(folder: Path) -> dict[str, Any]:
    """Train on one micro batch an iteration and process, and measure."""
    return train(folder, Asks())
