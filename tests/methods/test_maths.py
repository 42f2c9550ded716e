"""The pure maths, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from attrs import evolve
from distill_methods import TimeSampling
from distill_methods.maths import (
    bsmntw_weight,
    dmd_gradient,
    dmd_loss,
    dmd_normaliser,
    repeat_per_frame,
    sample_timesteps,
    sample_timesteps_within,
    velocity_loss,
)
from distill_methods.time_sampling import probability_below, probability_within
from distill_protocols import RowGenerators
from hypothesis import given
from hypothesis import strategies as st


def column(*values: float) -> torch.Tensor:
    """[len(values), 1, 1, 1, 1]."""
    return torch.tensor(values).view(-1, 1, 1, 1, 1)


def test_dmd_gradient_by_hand():
    # Two samples of two values. Sample 0: x - r = (3, -1), so n = 2; f - r = (1, 4).
    # Sample 1: x - r = (10, 30), so n = 20; f - r = (-20, 2).
    x = torch.tensor([[4.0, 1.0], [10.0, 30.0]]).view(2, 2, 1, 1, 1)
    r = torch.tensor([[1.0, 2.0], [0.0, 0.0]]).view(2, 2, 1, 1, 1)
    f = torch.tensor([[2.0, 6.0], [-20.0, 2.0]]).view(2, 2, 1, 1, 1)
    assert dmd_normaliser(x, r).flatten().tolist() == [2.0, 20.0]
    g = dmd_gradient(x, f, r)
    assert g.flatten().tolist() == pytest.approx([0.5, 2.0, -1.0, 0.1])
    # L = 0.5 mean(g^2) = 0.5 (0.25 + 4 + 1 + 0.01) / 4
    assert dmd_loss(x, g).item() == pytest.approx(5.26 / 8, rel=1e-6)


def test_dmd_gradient_is_zero_where_all_agree():
    x = column(1.0, 2.0)
    g = dmd_gradient(x, x, x)
    assert g.tolist() == torch.zeros_like(x).tolist()


def test_dmd_gradient_keeps_no_history_and_is_fp32():
    x = column(1.0, 2.0).bfloat16().requires_grad_()
    g = dmd_gradient(x, 3 * x, 2 * x)
    assert not g.requires_grad
    assert g.dtype == torch.float32


def test_velocity_loss_by_hand():
    pred, target = column(1.0, 5.0), column(0.0, 3.0)
    assert velocity_loss(pred, target).item() == pytest.approx((1 + 4) / 2)
    weight = torch.tensor([3.0, 0.5])
    assert velocity_loss(pred, target, weight).item() == pytest.approx((3 + 2) / 2)


def test_velocity_loss_with_a_weight_a_frame_by_hand():
    # [1, 1, T = 3, 1, 2]: mean squares of the frames are 1, 4 and 25.
    pred = torch.tensor([[1.0, -1.0], [2.0, 2.0], [3.0, 41.0**0.5]]).view(1, 1, 3, 1, 2)
    weight = torch.tensor([[3.0, 0.0, 1.0]])
    loss = velocity_loss(pred, torch.zeros_like(pred), weight)
    assert loss.item() == pytest.approx((3 * 1 + 0 * 4 + 25) / 3)
    trained = torch.tensor([0.0, 1.0, 1.0]).view(1, 1, 3, 1, 1)
    loss = velocity_loss(pred, torch.zeros_like(pred), weight, trained)
    assert loss.item() == pytest.approx((0 * 4 + 25) / 2)


def test_a_weight_a_frame_that_is_the_samples_own_is_its_weight():
    rows = RowGenerators.seeded(0, "x", range(2))
    pred, target = rows.normal((2, 3, 2, 2)), rows.normal((2, 3, 2, 2))
    weight = torch.tensor([0.5, 2.0])
    by_frame = velocity_loss(pred, target, weight[:, None].expand(2, 3))
    torch.testing.assert_close(by_frame, velocity_loss(pred, target, weight))


def test_a_value_per_chunk_is_repeated_for_its_frames():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert repeat_per_frame(values, [1, 3, 2]).tolist() == [[1, 2, 2, 2, 3, 3], [4, 5, 5, 5, 6, 6]]


def test_velocity_loss_of_bf16_predictions_is_taken_in_fp32():
    pred, target = column(256.0).bfloat16(), column(255.5)
    assert velocity_loss(pred, target).item() == 0.25


def test_timesteps_follow_the_shifted_uniform_distribution():
    time = TimeSampling(shift=5.0, t_min=20, t_max=980)
    t = sample_timesteps(time, RowGenerators.seeded(0, "t", range(20_000)))
    assert t.dtype == torch.float32
    assert t.min() == 20
    assert t.max() == 980
    # P(t < 500) = S_5^-1(0.5) = 0.5 / (5 - 4 * 0.5) = 1 / 6
    assert (t < 500).float().mean().item() == pytest.approx(1 / 6, abs=0.01)
    # P(t clamped from above) = 1 - S_5^-1(0.98) = 1 - 0.98 / (5 - 4 * 0.98)
    assert (t == 980).float().mean().item() == pytest.approx(1 - 0.98 / 1.08, abs=0.01)


def test_timesteps_follow_the_logit_normal_distribution():
    time = TimeSampling(distribution="logit_normal", mean=1.0, std=0.5)
    t = sample_timesteps(time, RowGenerators.seeded(0, "t", range(20_000)))
    # Quantiles go through the sigmoid: P(t < 1000 sigmoid(mean + std z)) = Phi(z).
    for z in (-1.0, 0.0, 1.0):
        edge = 1000 / (1 + math.exp(-(1.0 + 0.5 * z)))
        expected = 0.5 * (1 + math.erf(z / math.sqrt(2)))
        assert (t < edge).float().mean().item() == pytest.approx(expected, abs=0.01)


@given(
    shift=st.floats(0.5, 12),
    low=st.floats(100, 600),
    width=st.floats(100, 400),
    normal=st.booleans(),
    split=st.floats(0.2, 0.8),
)
def test_truncated_times_keep_their_odds(
    shift: float, low: float, width: float, normal: bool, split: float
):
    """Within the limits the distribution is that without limits, given that t lies there; nothing
    gathers at a limit."""
    free = TimeSampling(distribution="logit_normal" if normal else "uniform", shift=shift)
    limited = evolve(free, t_min=low, t_max=low + width, limits="truncate")
    place = low + split * width
    share = probability_within(free, low, place) / probability_within(free, low, low + width)
    assert probability_below(limited, place) == pytest.approx(share, abs=1e-9)
    t = sample_timesteps(limited, RowGenerators.seeded(0, "t", range(400)))
    assert low <= t.min() <= t.max() <= low + width
    assert len(t.unique()) > 390
    assert (t < place).float().mean().item() == pytest.approx(share, abs=0.13)  # 5 sigma
    # Quantiles of a range of it (an expert's) are the same ones.
    inside = sample_timesteps_within(torch.tensor([0.5]), limited, (low, place)).double()
    expected = probability_below(limited, place) / 2
    assert probability_below(limited, float(inside)) == pytest.approx(expected, abs=1e-4)


def test_bsmntw_weight_by_hand():
    t = torch.arange(0, 1000, 0.5, dtype=torch.float64) + 0.25
    assert bsmntw_weight(t).mean().item() == pytest.approx(1.0, abs=1e-6)
    ends = bsmntw_weight(torch.tensor([0.0, 1000.0]))
    assert ends.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    # (1 - e^-0.5) / (integral of exp(-2 z^2) over [-.5, .5] - e^-0.5)
    assert bsmntw_weight(torch.tensor([500.0])).item() == pytest.approx(1.5796, abs=1e-3)


def test_times_of_a_range_are_its_quantiles():
    quantiles = torch.tensor([0.0, 0.25, 0.5, 1 - 1e-6])
    uniform = TimeSampling(distribution="uniform", t_min=0.0, t_max=1000.0)
    times = sample_timesteps_within(quantiles, uniform, (200.0, 600.0))
    torch.testing.assert_close(times, torch.tensor([200.0, 300.0, 400.0, 599.9996]))
    # Half of sigmoid(N(0, 1)) is below 0.5, so the median of what is above is its third quartile.
    normal = TimeSampling(distribution="logit_normal", mean=0.0, std=1.0, t_min=0.0, t_max=1000.0)
    (median,) = sample_timesteps_within(torch.tensor([0.5]), normal, (500.0, 1000.0)).tolist()
    assert median == pytest.approx(1000 / (1 + math.exp(-0.6744898)), rel=1e-5)
