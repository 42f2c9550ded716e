"""Causal consistency: the loss against a formula by hand, and whose weights predict the target."""

from __future__ import annotations

import copy

import pytest
import torch
from distill_conformance.toy import LATENT_SHAPE, ToyAdapter, ToyConditioning, toy_batch
from distill_methods import CausalConsistencyConfig, CausalConsistencyMethod, Discrete
from distill_protocols import (
    CapabilityError,
    PlannedRun,
    RandomStreams,
    RoleError,
    RoleSpec,
    SamplerSpec,
)
from distill_trainer.callbacks.ema import ExponentialMovingAverage
from toy_roles import BOTH_CAUSAL, CAUSAL, gradients, toy_bundle

GRID = (1.0, 2.25 / 2.5, 1.5 / 2, 0.75 / 1.5, 0.0)
"""sigma of S_3(1 - n / 4): 3 u / (1 + 2 u)."""


def build(*, able=BOTH_CAUSAL, **options) -> CausalConsistencyMethod:
    bundle = toy_bundle(student=1, teacher=2)
    config = {"discrete": Discrete(steps=4, shift=3.0, loss="l2"), "guidance_scale": 2.0}
    return CausalConsistencyMethod(
        bundle,
        ToyAdapter(bundle, capabilities=able),
        CausalConsistencyConfig(**config | options),
        conditioning=ToyConditioning(),
        streams=RandomStreams(0),
    )


def average(method: CausalConsistencyMethod) -> torch.nn.Module:
    """Let the student have an average that is not what it is, and return a copy of it."""
    student = method.bundle["student"]
    module = student.modules["transformer"]
    student.ema["transformer"] = ExponentialMovingAverage(module, 0.5)
    averaged = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
    return averaged


def over(value: torch.Tensor) -> torch.Tensor:
    return value.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("context_noise", [0.0, 100.0])
@pytest.mark.parametrize("target", ["ema", "student"])
def test_the_loss_against_an_independent_formula(target: str, context_noise: float):
    """t, past, the teacher's step and both clean clips by hand, in fp64."""
    sampler = SamplerSpec(steps=2, stochastic=True, context_noise=context_noise)
    method = build(target=target, student_sampler=sampler)
    averaged = average(method).double()
    student = method.bundle["student"].modules["transformer"]
    before = copy.deepcopy(student.state_dict())
    batch = toy_batch(6)
    actual = method.single_train_step(batch, 1)
    actual.loss_map["total_loss"].backward()
    grads = gradients(method.bundle)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())

    teacher = copy.deepcopy(method.bundle["teacher"].modules["transformer"]).double()
    student = copy.deepcopy(student).double()
    student.zero_grad()
    streams, text = RandomStreams(0), batch.cond.tensors["text"].double()
    x0 = (batch.latents.double() - 0.5) / 2.0
    n = streams.rows("causal_consistency.pair", 6).integers(4)
    s, after = (torch.tensor(GRID, dtype=torch.float64)[n + k] for k in (0, 1))
    eps = streams.rows("causal_consistency.noise", 6).normal(LATENT_SHAPE).double()
    x_t = over(1 - s) * x0 + over(s) * eps
    c = context_noise / 1000
    seen = (1 - c) * x0
    if c:
        seen = seen + c * streams.rows("causal_consistency.past", 6).normal(LATENT_SHAPE).double()
    # Toy models read the mean of the frames before each one.
    past = torch.stack(
        [seen[:, :, :k].mean(dim=2) if k else 0 * seen[:, :, 0] for k in range(seen.shape[2])],
        dim=2,
    )
    cond, uncond = (teacher(x_t, 1000 * s, y, past) for y in (text, torch.full_like(text, -0.5)))
    x_after = (x_t - over(s - after) * (uncond + 2 * (cond - uncond))).detach()
    net = averaged if target == "ema" else student
    end = (x_after - over(after) * net(x_after, 1000 * after, text, past)).detach()
    d = x_t - over(s) * student(x_t, 1000 * s, text, past) - end
    expected = d.square().mean()
    torch.testing.assert_close(actual.loss_map["total_loss"].double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(actual.outputs["target_x0"].double(), end, rtol=1e-5, atol=1e-6)
    expected.backward()
    assert not grads["teacher"]
    for ours, theirs in zip(grads["student"], student.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), theirs.grad, rtol=1e-4, atol=1e-7)


def test_a_later_chunk_changes_no_earlier_target():
    """What makes the target one that a causal student can know."""
    method = build(target="student")
    batch = toy_batch(2)
    first = method.single_train_step(batch, 1).outputs["target_x0"]
    batch.latents[:, :, -1] += 1.0
    method.streams.load_state_dict(RandomStreams(0).state_dict())
    second = method.single_train_step(batch, 1).outputs["target_x0"]
    assert torch.equal(first[:, :, :-1], second[:, :, :-1])
    assert not torch.equal(first[:, :, -1], second[:, :, -1])


def test_a_teacher_that_sees_later_chunks_is_refused():
    with pytest.raises(CapabilityError, match="causal:teacher"):
        build(able=CAUSAL)


def test_without_an_average_there_is_no_target():
    with pytest.raises(RoleError, match="keeps no EMA"):
        build().single_train_step(toy_batch(2), 1)
    roles = {
        name: RoleSpec(name=name, path="x", trainable=name == "student")
        for name in ("student", "teacher")
    }
    (problem,) = CausalConsistencyConfig().problems(PlannedRun(roles=roles))
    assert "target" in str(problem.path)
    assert "let the ema callback average" in problem.message
    kept = PlannedRun(roles=roles, averaged=frozenset({"student"}))
    assert not list(CausalConsistencyConfig().problems(kept))
