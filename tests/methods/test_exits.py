"""A critic that is told the exit step, guidance by exit, and how often each step is the exit."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from distill_conformance.toy import ToyAdapter, ToyConditioning, toy_batch, toy_models
from distill_methods import (
    CausVidConfig,
    CausVidMethod,
    DMD2Config,
    DMD2Method,
    RCMConfig,
    RCMMethod,
    SelfForcingConfig,
    SelfForcingMethod,
)
from distill_methods.exits import ExitSteps, exit_weights
from distill_methods.noise_sampler import NoiseSampler
from distill_protocols import EXIT_EMBEDDING, ContractError, ExitSpec, RandomStreams, SamplerSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_roles import gradients

THREE = SamplerSpec(steps=3, shift=3.0, stochastic=True)
ROWS = 4
METHODS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "dmd2 simulate": (DMD2Method, DMD2Config(student_sampler=THREE), ()),
    "dmd2 data": (DMD2Method, DMD2Config(student_sampler=THREE, rollout="data"), ()),
    "rcm": (RCMMethod, RCMConfig(student_sampler=THREE), ()),
    "causvid": (CausVidMethod, CausVidConfig(student_sampler=THREE), ("student",)),
    "self_forcing": (SelfForcingMethod, SelfForcingConfig(student_sampler=THREE), ("student",)),
    "self_forcing, steps of their own": (
        SelfForcingMethod,
        SelfForcingConfig(student_sampler=THREE, same_step_across_chunks=False),
        ("student",),
    ),
}


def build(name: str, *, seed: int = 0, rows: float = 0.0, **options: Any) -> Any:
    """Build a method of ``METHODS``.

    Args:
        rows: of the critic's embedding of exit steps: row k is ``rows * (k + 1)``.
    """
    method, config, causal = METHODS[name]
    config = attrs.evolve(config, generator_update_interval=2, **options)
    adapter, bundle = toy_models(config.roles, seed=1, causal_roles=causal)
    if embedding := bundle["critic"].modules.get(EXIT_EMBEDDING):
        with torch.no_grad():
            for parameter in embedding.parameters():
                steps = torch.arange(1, len(parameter) + 1, dtype=torch.float32)
                parameter.copy_(rows * steps[:, None].expand_as(parameter))
    streams = RandomStreams(seed)
    return method(bundle, adapter, config, conditioning=ToyConditioning(), streams=streams)


def step(method: Any, iteration: int, batch: Any = None) -> Any:
    result = method.single_train_step(batch or toy_batch(ROWS), iteration)
    result.loss_map["total_loss"].backward()
    return result


@pytest.mark.parametrize("name", METHODS)
def test_the_first_iteration_is_that_of_a_critic_that_is_told_nothing(name: str):
    """Bit for bit: losses, outputs, and the gradients of student and critic."""
    for iteration in (1, 2):
        told, plain = build(name, critic_exits=True), build(name)
        a, b = step(told, iteration), step(plain, iteration)
        assert a.loss_map.keys() == b.loss_map.keys()
        assert all(torch.equal(a.loss_map[key], b.loss_map[key]) for key in a.loss_map)
        assert all(torch.equal(a.outputs[key], b.outputs[key]) for key in a.outputs)
        ours, theirs = gradients(told.bundle), gradients(plain.bundle)
        for role, values in theirs.items():
            assert all(map(torch.equal, ours[role], values))
        embedding = told.bundle["critic"].modules[EXIT_EMBEDDING]
        has_gradient = any(p.grad is not None and p.grad.any() for p in embedding.parameters())
        assert has_gradient == (iteration == 1), "the critic's turn trains it, and no other"


@pytest.mark.parametrize("name", METHODS)
def test_the_critic_is_told_the_exits_of_the_clips_that_it_sees(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    """In both turns, as the adapter itself was told them: by the clip's own rollout."""
    told: list[torch.Tensor] = []
    made: list[torch.Tensor] = []
    plain = ToyAdapter.forward_at_exits

    def note(self: ToyAdapter, *args: Any, exits: torch.Tensor, **options: Any) -> torch.Tensor:
        told.append(exits.expand(ROWS, 2))
        return plain(self, *args, exits=exits, **options)

    monkeypatch.setattr(ToyAdapter, "forward_at_exits", note)
    method = build(name, critic_exits=True, rows=0.5)
    rollout = method._matching._rollout
    monkeypatch.setattr(
        method._matching,
        "_rollout",
        lambda *args: made.append((r := rollout(*args)).exits.expand(ROWS, 2)) or r,
    )
    for iteration in range(1, 7):
        step(method, iteration)
    assert len(told) == len(made) == 6
    assert all(map(torch.equal, told, made))
    assert torch.cat(told).unique().numel() > 1


def test_the_critic_turn_against_an_independent_formula():
    """The loss is that of a critic whose text is that of the row's own exit."""
    method = build("dmd2 data", critic_exits=True, rows=0.5)
    batch = toy_batch(ROWS)
    result = step(method, 1, batch)
    streams = RandomStreams(0)
    exits = streams.rows("dmd2.critic.data_step", ROWS).integers(3)
    u = streams.rows("dmd2.critic.t", ROWS).uniform()
    t = (1000 * 5 * u / (1 + 4 * u)).clamp(20, 980)
    x0 = result.outputs["student_x0"]
    noise = streams.rows("dmd2.critic.noise", ROWS).normal(x0.shape[1:])
    s = (t / 1000).view(-1, 1, 1, 1, 1)
    text = batch.cond.tensors["text"] + 0.5 * (exits + 1)[:, None]
    net = method.bundle["critic"].modules["transformer"]
    v = net((1 - s) * x0 + s * noise, t, text)
    expected = (v - (noise - x0)).square().mean()
    torch.testing.assert_close(result.loss_map["critic_loss"], expected)


@pytest.mark.parametrize("name", ["dmd2 simulate", "dmd2 data", "causvid"])
def test_guidance_by_exit_is_each_exits_own(name: str):
    """One number for all is that number; of several, each clip and frame has that of its exit."""
    scales = (1.0, 2.0, 4.0)
    for seed in range(4):
        one = step(build(name, seed=seed, real_score_guidance_scale=2.0), 2).outputs
        same = step(build(name, seed=seed, real_score_guidance_scale=(2.0,) * 3), 2).outputs
        assert all(torch.equal(same[key], one[key]) for key in one)
        method = build(name, seed=seed, real_score_guidance_scale=scales)
        exits = method._matching._rollout(toy_batch(ROWS), "student", 2).exits.expand(ROWS, 2)
        several = step(build(name, seed=seed, real_score_guidance_scale=scales), 2).outputs
        for w, k in zip(scales, range(3), strict=True):
            alone = step(build(name, seed=seed, real_score_guidance_scale=w), 2).outputs
            here = (exits.clamp(max=2) == k)[:, None, :, None, None].expand_as(alone["teacher_x0"])
            assert torch.equal(several["teacher_x0"][here], alone["teacher_x0"][here])


def test_ranks_call_the_teachers_alike_whatever_their_clips():
    """Exits that differ between ranks decide no number of calls: a sharded teacher would wait."""
    counts = set()
    for seed in range(6):
        method = build("dmd2 data", seed=seed, real_score_guidance_scale=(1.0, 2.0, 4.0))
        step(method, 2, toy_batch(1))
        counts.add(sum(call.role == "teacher" for call in method.adapter.calls))
    assert counts == {3}


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(any),
    st.integers(0, 2**31),
)
def test_exits_are_drawn_by_their_weights(weights: list[int], seed: int):
    """What has weight 0 is never drawn, shares are near the weights, and rows are independent."""
    sampler = NoiseSampler(ToyAdapter(toy_models(DMD2Config().roles)[1]), RandomStreams(seed))
    choice = exit_weights(tuple(map(float, weights)), len(weights))
    assert sum(choice) == pytest.approx(len(weights))
    exits = ExitSteps(tuple(range(len(weights))), choice)
    drawn = sampler.sample_exits("rows", 400, exits)
    shares = torch.bincount(drawn, minlength=len(weights)) / 400
    expected = torch.tensor(weights) / sum(weights)
    assert not shares[expected == 0].any()
    assert torch.allclose(shares, expected.float(), atol=0.15)
    assert all(weights[sampler.sample_shared_exit("shared", exits)] for _ in range(20))


@pytest.mark.parametrize("name", METHODS)
def test_the_last_exit_alone(name: str):
    method = build(name, exit="last")
    for iteration in range(1, 7):
        exits = method._matching._rollout(toy_batch(ROWS), "student", iteration).exits
        clean = 3  # CausVid's chunks of data
        assert set(exits.unique().tolist()) <= {2, clean if name == "causvid" else 2}


def test_a_critic_of_other_exits_is_refused():
    config = DMD2Config(student_sampler=THREE, critic_exits=True)
    for exits in (None, ExitSpec(count=2)):
        needs = [attrs.evolve(n, exits=exits) if n.exits else n for n in config.roles]
        adapter, bundle = toy_models(needs)
        with pytest.raises(ContractError, match="the critic was loaded with"):
            DMD2Method(bundle, adapter, config, conditioning=ToyConditioning())
