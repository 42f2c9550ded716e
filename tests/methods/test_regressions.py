"""Finetune and teacher-only: what they minimise, and that minimising it works."""

from __future__ import annotations

import attrs
import pytest
import torch
from distill_conformance.toy import (
    CAPABILITIES,
    LATENT_SHAPE,
    ToyAdapter,
    ToyConditioning,
    toy_batch,
)
from distill_methods import (
    FinetuneConfig,
    FinetuneMethod,
    TeacherOnlyConfig,
    TeacherOnlyMethod,
    TimeSampling,
)
from distill_protocols import (
    CapabilityError,
    ConditioningError,
    RandomStreams,
    RoleError,
    SamplerSpec,
)
from toy_roles import gradients, toy_bundle

PLAIN = SamplerSpec(steps=4)
GUIDED = SamplerSpec(steps=4, guidance=3.0)


def finetune(
    *, bundle=None, has_negative=True, able=CAPABILITIES, lr=1e-2, **options
) -> FinetuneMethod:
    bundle = bundle or toy_bundle(student=1, lr=lr)
    return FinetuneMethod(
        bundle,
        ToyAdapter(bundle, capabilities=able),
        FinetuneConfig(**{"student_sampler": PLAIN} | options),
        conditioning=ToyConditioning(has_negative),
        streams=RandomStreams(0),
    )


def teacher_only(
    *, bundle=None, has_negative=True, able=CAPABILITIES, **options
) -> TeacherOnlyMethod:
    bundle = bundle or toy_bundle(student=1, teacher=2)
    return TeacherOnlyMethod(
        bundle,
        ToyAdapter(bundle, capabilities=able),
        TeacherOnlyConfig(**{"student_sampler": PLAIN} | options),
        conditioning=ToyConditioning(has_negative),
        streams=RandomStreams(0),
    )


def train(method, batch, iterations: int) -> list[float]:
    losses = []
    for iteration in range(1, iterations + 1):
        loss = method.single_train_step(batch, iteration).loss_map["total_loss"]
        loss.backward()
        assert method.optimizers_schedulers_step(iteration) == ("student.transformer",)
        method.optimizers_zero_grad(iteration)
        losses.append(loss.item())
    return losses


def over(value: torch.Tensor) -> torch.Tensor:
    return value.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("weighting", ["none", "bsmntw"])
def test_finetune_against_an_independent_formula(weighting: str):
    method = finetune(weighting=weighting, time=TimeSampling(shift=3.0))
    batch = toy_batch(4)
    result = method.single_train_step(batch, 1)
    streams = RandomStreams(0)
    u = streams.rows("finetune.t", 4).uniform()
    eps = streams.rows("finetune.noise", 4).normal(LATENT_SHAPE)
    t = 1000 * 3 * u / (1 + 2 * u)
    x0, s = (batch.latents - 0.5) / 2.0, over(t / 1000)
    x_t = (1 - s) * x0 + s * eps
    net = method.bundle["student"].modules["transformer"]
    v = net(x_t, t, batch.cond.tensors["text"])
    error = (v - (eps - x0)).square().mean(dim=(1, 2, 3, 4))
    if weighting == "bsmntw":
        # The mean of the bell over a fine grid replaces its closed form.
        grid = torch.linspace(0, 1000, 100_001, dtype=torch.float64)
        bell = torch.exp(-2 * ((grid - 500) / 1000) ** 2)
        weight = torch.exp(-2 * ((t - 500) / 1000) ** 2) - bell.min()
        error = error * weight / (bell - bell.min()).mean()
    torch.testing.assert_close(
        result.loss_map["total_loss"], error.mean().float(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(result.outputs["student_x0"], (x_t - s * v).detach())


def test_finetune_overfits_one_clip():
    method = finetune(time=TimeSampling(t_min=200))
    batch = attrs.evolve(toy_batch(8), latents=torch.full((8, *LATENT_SHAPE), 1.5))
    losses = train(method, batch, 250)
    assert sum(losses[-20:]) / 20 < 0.25 * sum(losses[:5]) / 5


def test_teacher_only_against_an_independent_formula():
    method = teacher_only(guidance_scale=3.0, time=TimeSampling(t_min=300, t_max=700))
    batch = toy_batch(4)
    actual = method.single_train_step(batch, 1).loss_map["total_loss"]
    streams = RandomStreams(0)
    t = (1000 * streams.rows("teacher_only.t", 4).uniform()).clamp(300, 700)
    eps = streams.rows("teacher_only.noise", 4).normal(LATENT_SHAPE)
    s, text = over(t / 1000), batch.cond.tensors["text"]
    x_t = (1 - s) * (batch.latents - 0.5) / 2.0 + s * eps
    teacher, student = (method.bundle[n].modules["transformer"] for n in ("teacher", "student"))
    c, u = teacher(x_t, t, text), teacher(x_t, t, torch.full_like(text, -0.5))
    expected = (student(x_t, t, text) - (3 * c - 2 * u)).square().mean()
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("input", ["data", "student"])
def test_a_loss_on_x0_is_that_on_v_times_sigma_squared(input: str):
    """Computed from the clean clips that the two imply, not from v: to fp32's rounding."""
    options = {"guidance_scale": 3.0, "input": input, "time": TimeSampling(t_min=30)}
    actual = teacher_only(target="x0", **options).single_train_step(toy_batch(8), 1)
    expected = (actual.outputs["student_x0"] - actual.outputs["teacher_x0"]).square().mean()
    torch.testing.assert_close(actual.loss_map["total_loss"].detach(), expected, rtol=1e-5, atol=0)
    on_v = teacher_only(**options).single_train_step(toy_batch(8), 1)
    torch.testing.assert_close(on_v.outputs["student_x0"], actual.outputs["student_x0"])
    assert on_v.loss_map["total_loss"] > 1.2 * expected


def test_the_student_can_be_compared_on_its_own_clips():
    spec = SamplerSpec(steps=2, shift=3.0, stochastic=True)
    time = TimeSampling(t_min=300, t_max=700)
    method = teacher_only(input="student", guidance_scale=1.0, student_sampler=spec, time=time)
    batch = toy_batch(4)
    actual = method.single_train_step(batch, 1).loss_map["total_loss"]
    actual.backward()
    grads = gradients(method.bundle)["student"]
    streams, text = RandomStreams(0), batch.cond.tensors["text"]
    student, teacher = (method.bundle[n].modules["transformer"] for n in ("student", "teacher"))
    student.zero_grad()
    with torch.no_grad():
        x = streams.rows("teacher_only.rollout", 4).normal(LATENT_SHAPE)
        x = x - student(x, torch.full((4,), 1000.0), text)
        fresh = streams.rows("teacher_only.rollout.fresh", 4).normal(LATENT_SHAPE)
        x = 0.25 * x + 0.75 * fresh  # S_3(.5) = .75
        x = x - 0.75 * student(x, torch.full((4,), 750.0), text)
    t = (1000 * streams.rows("teacher_only.t", 4).uniform()).clamp(300, 700)
    eps = streams.rows("teacher_only.noise", 4).normal(LATENT_SHAPE)
    x_t = (1 - over(t / 1000)) * x + over(t / 1000) * eps
    expected = (student(x_t, t, text) - teacher(x_t, t, text)).square().mean()
    torch.testing.assert_close(actual, expected)
    expected.backward()
    for ours, theirs in zip(grads, gradients(method.bundle)["student"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    sampled = [call for call in method.adapter.calls if call.role == "student"][:2]
    assert not any(call.with_gradient for call in sampled)
    assert all(p.requires_grad for p in student.parameters())


def test_teacher_only_brings_the_student_to_the_guided_teacher():
    losses = train(teacher_only(guidance_scale=2.0), toy_batch(16), 250)
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])


def test_batch_ids_are_the_samples_own():
    assert finetune().batch_ids(toy_batch(2)) == ("sample-0", "sample-1")


@pytest.mark.parametrize("make", [finetune, teacher_only])
def test_refusals(make):
    with pytest.raises(ConditioningError, match="no negative"):
        make(has_negative=False, student_sampler=GUIDED)
    with pytest.raises(CapabilityError, match="supports_cfg"):
        make(able=attrs.evolve(CAPABILITIES, supports_cfg=False), student_sampler=GUIDED)
    with pytest.raises(RoleError, match=r"missing role.*student"):
        make(bundle=toy_bundle(teacher=1))


def test_teacher_only_refuses_what_would_mislead():
    with pytest.raises(ConditioningError, match="no negative"):
        teacher_only(has_negative=False)
    teacher_only(has_negative=False, guidance_scale=1.0)
    bundle = toy_bundle(student=1, teacher=2)
    bundle["teacher"].trainable = True
    with pytest.raises(RoleError, match="'teacher' is trainable"):
        teacher_only(bundle=bundle)
