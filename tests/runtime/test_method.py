"""The stepping of every method: who steps with whose scheduler, fp16, state, roles."""

from __future__ import annotations

import pytest
import torch
from distill_protocols import ContractError, ModelBundle, RoleError, RoleHandle, StepResult
from distill_runtime import DistillMethod
from hypothesis import given
from hypothesis import strategies as st
from torch import nn


def handle(name: str, *, trainable: bool, precision: str = "fp32") -> RoleHandle:
    role = RoleHandle(
        name=name,
        modules={"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)},
        trainable=trainable,
        precision=precision,  # type: ignore[arg-type]
    )
    if trainable:
        for key, module in role.modules.items():
            role.optimizers[key] = torch.optim.SGD(module.parameters(), lr=1.0)
            role.schedulers[key] = torch.optim.lr_scheduler.LambdaLR(
                role.optimizers[key], lambda n: 1 / (n + 1)
            )
    return role


class Turns(DistillMethod[None]):
    """A method that steps the roles of a table; its loss is the sum of the turn's weights."""

    required_roles = ("student", "critic")
    frozen_roles = ("teacher",)
    table: tuple[tuple[str, ...], ...] = ()

    def single_train_step(self, batch, iteration):
        roles = self.table[iteration - 1]
        total = sum(
            (
                p.sum()
                for r in roles
                for m in self.bundle[r].modules.values()
                for p in m.parameters()
            ),
            start=torch.zeros((), requires_grad=True) + 0,
        )
        return StepResult({"total_loss": total}, {})

    def get_optimizers(self, iteration):
        return self.optimizers_of(*self.table[iteration - 1])


def turns_method(table, precision: str = "fp32") -> Turns:
    bundle = ModelBundle(
        {n: handle(n, trainable=True, precision=precision) for n in ("student", "critic")}
    )
    method = Turns(bundle, None)
    method.table = table
    return method


turn = st.sampled_from([(), ("student",), ("critic",), ("student", "critic")])


@given(st.lists(turn, min_size=1, max_size=12))
def test_a_scheduler_steps_exactly_with_its_optimizer(table):
    method = turns_method(tuple(table))
    for iteration in range(1, len(table) + 1):
        method.single_train_step(None, iteration).loss_map["total_loss"].backward()
        stepped = method.optimizers_schedulers_step(iteration)
        method.optimizers_zero_grad(iteration)
        assert set(stepped) == set(method.get_optimizers(iteration))
        assert set(method.get_lr_schedulers(iteration)) == set(stepped)
    for role in ("student", "critic"):
        expected = sum(role in row for row in table)
        for key in ("a", "b"):
            assert method.update_counts[f"{role}.{key}"] == expected
            assert method.scheduler_dict[f"{role}.{key}"].last_epoch == expected


def test_an_overflow_leaves_out_optimizer_and_scheduler_of_that_module_only():
    method = turns_method((("student", "critic"),) * 2, precision="fp16")
    assert method.grad_scaler.is_enabled()
    for iteration in (1, 2):
        loss = method.single_train_step(None, iteration).loss_map["total_loss"]
        method.grad_scaler.scale(loss).backward()
        if iteration == 2:
            method.model_dict["critic.b"].weight.grad.fill_(float("inf"))
        method.unscale_gradients(iteration)
        gradients = method.model_dict["student.a"].weight.grad
        assert torch.equal(gradients, torch.ones(2, 2)), "the loss is the sum of all weights"
        stepped = method.optimizers_schedulers_step(iteration)
        method.optimizers_zero_grad(iteration)
    assert "critic.b" not in stepped
    assert method.update_counts == {"student.a": 2, "student.b": 2, "critic.a": 2, "critic.b": 1}
    assert {k: s.last_epoch for k, s in method.scheduler_dict.items()} == method.update_counts
    again = turns_method((("student",),), precision="fp16")
    again.load_state_dict(method.state_dict())
    assert again.update_counts == method.update_counts
    assert again.grad_scaler.get_scale() == method.grad_scaler.get_scale()


def test_roles_are_checked_when_a_method_is_made():
    bundle = ModelBundle({"student": handle("student", trainable=True)})
    with pytest.raises(RoleError, match=r"missing role\(s\): critic; this run has: student"):
        Turns(bundle, None)
    bundle.roles["critic"] = handle("critic", trainable=True)
    bundle.roles["teacher"] = handle("teacher", trainable=True)
    with pytest.raises(RoleError, match="'teacher' is trainable"):
        Turns(bundle, None)


def test_a_role_whose_turn_it_is_needs_a_gradient():
    method = turns_method((("student", "critic"),))
    for module in method.bundle["student"].modules.values():
        module(torch.ones(2)).sum().backward()
    with pytest.raises(ContractError, match=r"iteration 1: no gradient reached critic, whose turn"):
        method.optimizers_schedulers_step(1)
    assert set(method.update_counts.values()) == {0}
