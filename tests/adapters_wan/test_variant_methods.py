"""Methods on other kinds of Wan than the first: given frames, and how t is drawn for experts.
(``tests/invariants/test_families.py`` has what holds for all of them.)"""

from __future__ import annotations

import math

import pytest
import torch
from attrs import evolve
from distill_methods import (
    DMD2Config,
    FinetuneConfig,
    GanConfig,
    TimeSampling,
)
from distill_methods.maths import sample_timesteps, sample_timesteps_within
from distill_methods.time_sampling import probability_below, probability_within
from distill_protocols import (
    Batch,
    Condition,
    ContractError,
    RandomStreams,
    RowGenerators,
    SamplerSpec,
)
from hypothesis import given
from hypothesis import strategies as st
from method_cases import SHAPE, Setups, gradients, turns

KINDS = ["finetune", "teacher_only", "kd", "dmd2 alternate data"]


@pytest.fixture(scope="module")
def worlds(folder_of):
    return Setups(folder_of)


# -- a GAN beside any distribution matching -------------------------------------------------------


@pytest.mark.parametrize("kind", ["self_forcing", "causvid"])
def test_a_causal_student_may_have_a_gan(kind, worlds):
    """The discriminator sees whole clips: its teacher is no causal role."""
    method = worlds.build(kind, "t2v", "causal", gan=GanConfig(r1_weight=1.0), f_divergence="js")
    for iteration in (1, 2):
        result = method.single_train_step(worlds.batch("t2v", 2), iteration)
        result.loss_map["total_loss"].backward()
        assert {key.split(".")[0] for key in gradients(method)} == turns(method, iteration)
        assert all(value.isfinite() for value in result.loss_map.values())
        method.optimizers_zero_grad(iteration)
    assert "gan_generator_loss" in result.loss_map


# -- the first frame stays out --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_given_first_frame_stays_out_of_the_loss(kind, worlds):
    """TI2V: what the clip itself has there changes neither loss nor gradient."""
    losses = []
    for value in (0.0, 50.0):
        method, given = worlds.build(kind, "ti2v", "bidirectional"), worlds.batch("ti2v", 2)
        given.latents[:, :, 0] = value
        loss = method.single_train_step(given, 2).loss_map["total_loss"]
        loss.backward()
        losses.append((loss.detach(), gradients(method)))
        method.optimizers_zero_grad(2)
    assert torch.equal(losses[0][0], losses[1][0])
    assert all(torch.equal(value, losses[1][1][key]) for key, value in losses[0][1].items())


def test_a_first_frame_stays_out_of_the_loss_of_clips_of_another_length(worlds):
    """In a run of several sizes, of which the adapter's own is one."""
    losses = []
    for value in (0.0, 50.0):
        method, given = worlds.build("finetune", "ti2v", "bidirectional"), worlds.batch("ti2v", 2)
        short = evolve(given, latents=given.latents[:, :, :2].clone())
        short.latents[:, :, 0] = value
        losses.append(float(method.single_train_step(short, 2).loss_map["total_loss"].detach()))
    assert losses[0] == losses[1]


def test_without_a_picture_the_first_frame_is_trained(worlds):
    losses = []
    for value in (0.0, 50.0):
        method, given = worlds.build("finetune", "ti2v", "bidirectional"), worlds.batch("ti2v", 2)
        given.latents[:, :, 0] = value
        text = Batch(
            latents=given.latents, cond=Condition({"text": given.cond.tensors["text"]}),
            ids=given.ids,
        )  # fmt: skip
        losses.append(float(method.single_train_step(text, 2).loss_map["total_loss"].detach()))
    assert losses[1] > 2 * losses[0]


def test_the_velocity_loss_of_trained_frames_by_hand(worlds):
    method, given = worlds.build("finetune", "ti2v", "bidirectional"), worlds.batch("ti2v", 2)
    loss = float(method.single_train_step(given, 1).loss_map["total_loss"].detach())
    streams = RandomStreams(0)
    adapter, _ = worlds("ti2v", "bidirectional")
    t = sample_timesteps(TimeSampling(shift=8.0), streams.rows("finetune.t", 2))
    noise = streams.rows("finetune.noise", 2).normal(SHAPE)
    x0 = adapter.normalize_latents(given.latents)
    x_t = adapter.add_noise(x0, noise, t)
    v = adapter.forward("student", x_t, t, given.cond)
    by_hand = (v - (noise - x0))[:, :, 1:].square().mean()
    assert loss == pytest.approx(float(by_hand.detach()), rel=1e-5)


# -- how t is drawn -------------------------------------------------------------------------------

shifts = st.floats(0.2, 12)
distributions = st.builds(
    # As fp32, which t is: a bound that is rounded onto the boundary would count for its other side.
    TimeSampling, shift=shifts, t_min=st.floats(0, 400, width=32),
    t_max=st.floats(600, 1000, width=32),
) | st.builds(
    TimeSampling, distribution=st.just("logit_normal"), mean=st.floats(-2, 2),
    std=st.floats(0.3, 2), shift=shifts,
)  # fmt: skip


@given(time=distributions, boundary=st.floats(50, 950, width=32))
def test_times_within_ranges_are_the_distribution_itself(time, boundary):
    """Drawn by range with the shares as chances, quantiles are those of drawing at once."""
    cut = [(0.0, boundary), (boundary, 1000.0)]
    shares = [probability_within(time, *within) for within in cut]
    assert sum(shares) == pytest.approx(1)
    straight = sample_timesteps(time, RowGenerators([torch.Generator().manual_seed(0)] * 4000))
    high = (straight >= boundary).double().mean()
    assert float(high) == pytest.approx(shares[1], abs=5 * math.sqrt(0.25 / 4000))
    assert probability_below(time, boundary) == pytest.approx(shares[0])
    # All quantiles of the distribution, range by range, are those of one whole range.
    full = sample_timesteps_within((torch.arange(50_000) + 0.5) / 50_000, time, (0.0, 1000.0))
    for within, part_of in zip(cut, shares, strict=True):
        if part_of < 0.02:
            continue
        t = sample_timesteps_within(torch.linspace(0, 0.999999, 500), time, within)
        assert t.dtype == torch.float32
        assert bool((t >= within[0]).all())
        assert bool((t < within[1]).all()) or within[1] == 1000
        assert bool((t.diff() >= 0).all())
        inside = full[(full >= within[0]) & (full < within[1] + (within[1] == 1000))]
        for q in (0.1, 0.5, 0.9):
            ours, theirs = t.quantile(q), inside.quantile(q)
            assert float(ours) == pytest.approx(float(theirs), abs=6 + 0.03 * 1000 / len(inside))


@given(time=distributions, boundary=st.floats(450, 550, width=32))
def test_times_never_reach_the_next_range(time, boundary):
    """Though fp32 would round the last of them onto its lower end."""
    last = torch.tensor([1 - 1e-15], dtype=torch.float64)
    assert float(sample_timesteps_within(last, time, (0.0, boundary))) < boundary
    assert float(sample_timesteps_within(0 * last, time, (boundary, 1000.0))) >= boundary


def test_the_trained_expert_is_drawn_by_its_share(worlds):
    """As often as plan and schedule expect: within four standard deviations in 3000 iterations."""
    count = 3000
    config = FinetuneConfig(time=TimeSampling(shift=8.0))
    method = worlds.build("finetune", "t2v-experts", "bidirectional")

    def probability(time_range):
        return probability_within(config.time, *time_range)

    drawn = [method.noise.sample_range("x", i, probability, "student") for i in range(1, count + 1)]
    expected = config.update_share("student", 875.0, 1000.0)
    assert expected == pytest.approx(0.5333, abs=1e-3)  # 1 - u with 8 u / (1 + 7 u) = .875
    share = sum(low == 875.0 for low, _ in drawn) / count
    assert share == pytest.approx(expected, abs=4 * math.sqrt(0.25 / count))
    again = worlds.build("finetune", "t2v-experts", "bidirectional")
    assert drawn[:9] == [
        again.noise.sample_range("x", i, probability, "student") for i in range(1, 10)
    ]


def test_published_shares():
    """P(high) at .875 for shifts 5, 8 and 12, and a four-step student's single low step."""
    for shift, percent in ((5.0, 42), (8.0, 53), (12.0, 63)):
        assert round(100 * probability_within(TimeSampling(shift=shift), 875, 1000)) == percent
    config = DMD2Config(student_sampler=SamplerSpec(steps=4, shift=12.0, stochastic=True))
    assert config.update_share("student", 0, 875) == 0.25
    assert config.update_share("student", 875, 1000) == 0.75
    # The critic learns at the scores' t, which end at 980.
    assert config.update_share("critic", 875, 1000) == pytest.approx(5 / 12, abs=1e-9)


# -- stepping -------------------------------------------------------------------------------------


def test_a_role_that_no_gradient_reaches_is_an_error(worlds):
    method = worlds.build("finetune", "t2v-experts", "bidirectional")
    with pytest.raises(ContractError, match="no gradient reached student"):
        method.optimizers_schedulers_step(1)
    assert set(method.update_counts.values()) == {0}
