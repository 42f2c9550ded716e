"""Of a role of two modules only those step that a gradient reached, scaled or not."""

from __future__ import annotations

import pytest
import torch
from distill_protocols import ModelBundle, RoleHandle, StepResult
from distill_runtime import DistillMethod
from distill_trainer import OptimizerConfig, ScheduleConfig, build_optimizers
from torch import nn

EXPERTS = ("transformer", "transformer_2")


class Turns(DistillMethod[None]):
    """Train in iteration i the expert ``order[i]``; both are in ``get_optimizers``."""

    def __init__(self, bundle, order):
        super().__init__(bundle, None)
        self.order = order

    def single_train_step(self, batch, iteration):
        role = self.bundle["student"]
        with role.autocast():
            out = role.modules[EXPERTS[self.order[iteration - 1]]](batch)
        return StepResult({"total_loss": out.float().square().mean()}, {})

    def get_optimizers(self, iteration):
        return self.optimizers_of("student")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_optimizers_without_a_gradient_wait(precision):
    modules = {name: nn.Linear(3, 3) for name in EXPERTS}
    role = RoleHandle(name="student", modules=modules, trainable=True, precision=precision)
    schedule = ScheduleConfig(name="linear")
    horizon = {"transformer": 4, "transformer_2": 10}
    build_optimizers(role, OptimizerConfig(lr=1e-2, schedule=schedule), horizon=horizon)
    order = (0, 1, 0, 0, 1)
    method = Turns(ModelBundle({"student": role}), order)
    counts = dict.fromkeys(EXPERTS, 0)
    for iteration, expert in enumerate(order, start=1):
        loss = method.single_train_step(torch.ones(2, 3), iteration).loss_map["total_loss"]
        method.grad_scaler.scale(loss).backward()
        method.unscale_gradients(iteration)
        stepped = method.optimizers_schedulers_step(iteration)
        method.optimizers_zero_grad(iteration)
        counts[EXPERTS[expert]] += 1
        assert stepped == (f"student.{EXPERTS[expert]}",)
        assert method.update_counts == {f"student.{k}": n for k, n in counts.items()}
    # Each on its own line: 3 of 4 steps done, and 2 of 10.
    rates = [role.optimizers[name].param_groups[0]["lr"] for name in EXPERTS]
    assert rates == pytest.approx([1e-2 * 1 / 4, 1e-2 * 8 / 10])
