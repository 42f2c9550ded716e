"""Phased DMD: the critic's target against true velocities, and a step by hand on two experts."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import wan_variants
from distill_methods import GanConfig, PhasedDMDConfig, TimeSampling
from distill_methods.maths import add_phase_noise, phase_velocity
from distill_protocols import ContractError, PlannedRun, RandomStreams, RoleSpec, SamplerSpec
from hypothesis import given
from hypothesis import strategies as st
from method_cases import SHAPE, Setups, gradients
from torch import Tensor

EULER = SamplerSpec(steps=4, shift=5.0)  # t = 1000, 937.5, 833.3, 625, and the boundary is 875
T_END = 1000 * 5 * 0.5 / 3

levels = st.tuples(st.floats(0.0, 0.9), st.floats(0.02, 0.98)).map(
    lambda pair: (1000 * pair[0], 1000 * (pair[0] + pair[1] * (0.999 - pair[0])))
)
"""(t_start, t) with t above."""


def as_clips(values: Tensor) -> Tensor:
    return values.double().view(-1, 1, 1, 1, 1)


# -- the kernel and the critic's target ---------------------------------------------------------


@given(levels, st.lists(st.floats(-2, 2), min_size=2, max_size=5), st.integers(0, 2**31))
def test_the_targets_mean_is_the_velocity_of_any_distribution(times, atoms, seed):
    """Clips at t_start are points of any weights. The velocity then follows from the density of
    x_t alone, ``v = -x / (1 - s) - s / (1 - s) d log p / dx``, by autograd; the target's mean from
    Bayes' rule over the points."""
    t_start, t = times
    s, s_b = t / 1000, t_start / 1000
    points = torch.tensor(atoms, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(atoms), generator=generator, dtype=torch.float64) + 0.05
    a = (1 - s) / (1 - s_b)
    spread = math.sqrt(s**2 - a**2 * s_b**2)
    x = a * points.mean() + spread * torch.randn(7, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    log_joint = weights.log() - (x[:, None] - a * points).square() / (2 * spread**2)
    score = torch.autograd.grad(log_joint.logsumexp(dim=1).sum(), x)[0]
    expected = -x / (1 - s) - s / (1 - s) * score

    posterior = log_joint.softmax(dim=1)
    noise = (x[:, None] - a * points) / spread
    pairs = as_clips(points.expand(7, -1).flatten()), as_clips(noise.flatten())
    rows = torch.full((7 * len(atoms),), t, dtype=torch.float64)
    torch.testing.assert_close(
        add_phase_noise(*pairs, rows, t_start).flatten().view(7, -1),
        x[:, None].expand(-1, len(atoms)), rtol=1e-9, atol=1e-9,
    )  # fmt: skip
    target = phase_velocity(*pairs, rows, t_start).flatten().view(7, -1)
    scale = float(target.detach().abs().max())
    torch.testing.assert_close(
        (posterior * target).sum(dim=1), expected, rtol=1e-7, atol=1e-9 * max(1.0, scale)
    )


@given(levels, st.integers(0, 2**31))
def test_noising_in_two_steps_is_noising_at_once(times, seed):
    """Of noised clips: the same mean and variance, whatever lies between; from t_start = 0 it is
    add_noise with its own target."""
    t_start, t = times
    s, s_b = t / 1000, t_start / 1000
    rows = torch.full((1,), t, dtype=torch.float64)
    zero, one = as_clips(torch.tensor([0.0])), as_clips(torch.tensor([1.0]))
    a = float(add_phase_noise(one, zero, rows, t_start))
    beta = float(add_phase_noise(zero, one, rows, t_start))
    assert a * (1 - s_b) == pytest.approx(1 - s, rel=1e-9)
    assert math.hypot(a * s_b, beta) == pytest.approx(s, rel=1e-9)
    x, noise = torch.randn(2, 3, 1, 1, 1, 1, dtype=torch.float64).unbind()
    plain = (1 - s) * x + s * noise
    torch.testing.assert_close(add_phase_noise(x, noise, rows, 0.0), plain)
    torch.testing.assert_close(phase_velocity(x, noise, rows, 0.0), noise - x)


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "boundary", "message"),
    [
        ({"student_sampler": SamplerSpec(steps=4, shift=7.0)}, 875, None),  # three steps and one
        ({"student_sampler": SamplerSpec(steps=2, timesteps=(1000, 900))}, 875, "for low noise"),
        ({"student_sampler": SamplerSpec(steps=2, timesteps=(800, 400))}, 875, "for high noise"),
        ({"exit": "last"}, 900, "for high noise"),
        ({"score_margin": 200.0}, 900, "high noise levels.*1075 to 980, which is empty"),
        ({"score_t_min": 900.0}, 900, "low noise levels.*from 900 to 875, which is empty"),
        ({"critic_time": TimeSampling(t_max=880.0)}, 900, "high noise levels.*900 to 880"),
    ],
)
def test_what_leaves_a_phase_out_is_a_problem(options, boundary, message):
    config = PhasedDMDConfig(**options)
    roles = {
        name: RoleSpec(name=name, path="a", trainable=name != "teacher")
        for name in ("student", "teacher", "critic")
    }
    run = PlannedRun(
        roles=roles, experts=frozenset(roles), boundaries=dict.fromkeys(roles, float(boundary))
    )
    problems = [problem.message for problem in config.problems(run)]
    if message is None:
        assert problems == []
        assert config.phases(boundary) == (875, 700.0)
        return
    assert len(problems) == 1
    with pytest.raises(ValueError, match=message):
        config.phases(boundary)


def test_roles_of_one_expert_are_problems():
    roles = {name: RoleSpec(name=name, path="a", trainable=True) for name in ("student", "critic")}
    run = PlannedRun(roles=roles, experts=frozenset(["critic"]), boundaries={"critic": 875.0})
    assert ["'student' has one expert" in p.message for p in PhasedDMDConfig().problems(run)] == [
        True
    ]


def test_a_discriminator_is_refused():
    with pytest.raises(ValueError, match="a discriminator reads clean clips"):
        PhasedDMDConfig(gan=GanConfig())


# -- a step on a tiny Wan of two experts ----------------------------------------------------------


@pytest.fixture(scope="module")
def setups(tmp_path_factory):
    base = tmp_path_factory.mktemp("variants")
    template = wan_variants.template(base / "template")

    def folder(name: str) -> str:
        path: Path = base / name
        return str(path if path.exists() else wan_variants.build(name, template, path))

    return Setups(folder)


def seed_of(setups: Any, turn: str, iteration: int, exit_step: int, **options: Any) -> int:
    """Find a seed under which the rollout of ``turn`` leaves at ``exit_step``."""
    for seed in range(60):
        method = setups.build("phased_dmd", "t2v-experts", "bidirectional", seed=seed, **options)
        with torch.no_grad():
            rollout = method._matching._rollout(setups.batch("t2v-experts", 1), turn, iteration)
        if rollout.exits.item() == exit_step:
            return seed
    raise AssertionError("no seed")


def call(method: Any, role: str, x: Tensor, t: float | Tensor, cond: Any) -> Tensor:
    rows = torch.as_tensor(t, dtype=torch.float32).expand(len(x))
    return method.adapter.forward(role, x, rows, cond, fwd_pred_type="v")


def chain(method: Any, batch: Any, purpose: str, exit_step: int, levels: Any) -> tuple[Any, ...]:
    """Walk by Euler to ``exit_step``; return x_k and its velocity, with gradient."""
    x = RandomStreams(method.streams.seed).rows(f"{purpose}.rollout", len(batch)).normal(SHAPE)
    for t, after in itertools.pairwise(levels[: exit_step + 1]):
        with torch.no_grad():
            x = x + (after - t) / 1000 * call(method, "student", x, t, batch.cond)
    return x, call(method, "student", x, levels[exit_step], batch.cond)


@pytest.mark.parametrize("exit_step", [0, 1, 2, 3])
@pytest.mark.parametrize("turn", ["critic", "student"])
def test_a_turn_against_an_independent_formula(setups, turn: str, exit_step: int):
    """Everything from the recorded draws: the chain, its end, the kernel, both losses and which
    expert gets a gradient."""
    iteration = 1 if turn == "critic" else 2
    seed = seed_of(setups, turn, iteration, exit_step)
    method = setups.build("phased_dmd", "t2v-experts", "bidirectional", seed=seed)
    batch = setups.batch("t2v-experts", 2)
    result = method.single_train_step(batch, iteration)
    result.loss_map["total_loss"].backward()
    reached = gradients(method)
    method.optimizers_zero_grad(iteration)

    is_high, purpose = exit_step < 2, f"phased_dmd.{turn}"
    assert list(reached) == [f"{turn}.transformer" + "_2" * (not is_high)]
    levels = [1000.0, 937.5, T_END, 625.0]
    x_k, velocity = chain(method, batch, purpose, exit_step, levels)
    s_k = levels[exit_step] / 1000
    x0 = x_k - s_k * velocity
    torch.testing.assert_close(result.outputs["student_x0"], x0.detach(), rtol=1e-4, atol=1e-4)

    streams = RandomStreams(seed)
    u = streams.rows(f"{purpose}.t", 2).uniform().double()
    low, high = (875.0, 980.0) if is_high else (20.0, T_END)
    inverse = lambda t: (t / 1000) / (8 - 7 * t / 1000)  # noqa: E731 - of S_8
    quantile = inverse(low) + u * (inverse(high) - inverse(low))
    t = (1000 * 8 * quantile / (1 + 7 * quantile)).float()
    assert ((low <= t) & (t <= high)).all()
    s = (t / 1000).view(-1, 1, 1, 1, 1)
    eps = streams.rows(f"{purpose}.noise", 2).normal(SHAPE)
    if is_high:
        s_b = T_END / 1000
        x_b = (x_k + (s_b - s_k) * velocity).detach()
        a = (1 - s) / (1 - s_b)
        beta = (s**2 - a**2 * s_b**2).sqrt()
        x_t = a * x_b + beta * eps
        score = -eps / beta  # of the kernel
        target = -x_t / (1 - s) - s / (1 - s) * score
    else:
        x_t, target = (1 - s) * x0.detach() + s * eps, eps - x0.detach()
    critic = call(method, "critic", x_t, t, batch.cond)
    if turn == "critic":
        expected = (critic - target).square().mean()
        torch.testing.assert_close(result.loss_map["critic_loss"], expected, rtol=1e-3, atol=0)
        return
    negative = method.conditioning.negative()
    with torch.no_grad():
        c, n = (call(method, "teacher", x_t, t, y) for y in (batch.cond, negative))
        real, fake = x_t - s * (n + 2 * (c - n)), x_t - s * critic
        g = (fake - real) / (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(
        result.loss_map["dmd_loss"], 0.5 * g.square().mean(), rtol=1e-3, atol=0
    )
    (x0 * g).sum().div(g.numel()).backward()
    (ours,), (name,) = reached.values(), reached
    torch.testing.assert_close(ours, gradients(method)[name], rtol=2e-2, atol=1e-6)
    method.optimizers_zero_grad(iteration)


def test_a_stochastic_sampler_is_matched_at_its_clean_clips(setups):
    """As x_b is their noise, noised further: the same distribution, and the plain target."""
    sampler = attrs.evolve(EULER, stochastic=True)
    seed = seed_of(setups, "critic", 1, 1, student_sampler=sampler)
    method = setups.build(
        "phased_dmd", "t2v-experts", "bidirectional", seed=seed, student_sampler=sampler
    )
    rollout = method._matching._rollout(setups.batch("t2v-experts", 1), "critic", 1)
    assert rollout.x_end is None
    time = method.config.score_time
    noised = method._matching._noising.add_noise(rollout, "here", 1, time, "critic")
    assert 875 <= float(noised.t) <= 980
    target = method._matching._noising.velocity(rollout, noised)
    torch.testing.assert_close(target, noised.noise - rollout.x0)


def test_one_expert_is_refused(setups):
    with pytest.raises(ContractError, match="'student' has one expert here"):
        setups.build("phased_dmd", "t2v", "bidirectional")
