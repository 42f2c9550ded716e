"""The maths of flow matching against independent formulas and their own inverses."""

from __future__ import annotations

import pytest
import torch
from distill_diffusers.calls import flow
from distill_protocols import ContractError
from hypothesis import given
from hypothesis import strategies as st

sigmas = st.lists(st.floats(0.001, 0.999), min_size=1, max_size=3)
any_sigmas = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=3)
seeds = st.integers(0, 2**31)


def draw(batch, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, 2, 3, 3, generator=generator, dtype=dtype) for _ in range(2)]


def time(values):
    return torch.tensor(values, dtype=torch.float64) * 1000


@given(any_sigmas, seeds)
def test_v_and_x0_round_trip(values, seed):
    x_t, v = draw(len(values), seed)
    x0 = flow.v_to_pred(v, x_t, time(values), "x0")
    back = flow.pred_to_v(x0, x_t, time(values), "x0")
    assert torch.allclose(back, v, atol=1e-10, rtol=1e-10)
    assert torch.equal(flow.pred_to_x0(v, x_t, time(values), "v"), x0)
    assert torch.equal(flow.pred_to_x0(x0, x_t, time(values), "x0"), x0)


@given(sigmas, seeds)
def test_v_and_eps_round_trip(values, seed):
    x_t, v = draw(len(values), seed)
    t = time(values)
    eps = flow.v_to_pred(v, x_t, t, "eps")
    assert torch.allclose(flow.pred_to_v(eps, x_t, t, "eps"), v, atol=1e-10, rtol=1e-10)
    x0 = flow.pred_to_x0(eps, x_t, t, "eps")
    assert torch.allclose(x0, flow.v_to_pred(v, x_t, t, "x0"), atol=1e-10, rtol=1e-10)


@given(sigmas, seeds)
def test_each_target_is_what_recovers_the_clean_latents(values, seed):
    """x_t and the target of any type give back x0: target, add_noise and pred_to_x0 agree."""
    x0, noise = draw(len(values), seed)
    t = time(values)
    x_t = flow.add_noise(x0, noise, t)
    for pred_type in ("v", "x0", "eps"):
        pred = flow.target(x0, noise, t, pred_type)
        assert torch.allclose(flow.pred_to_x0(pred, x_t, t, pred_type), x0, atol=1e-10)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=4), seeds)
def test_each_sample_has_its_own_time(values, seed):
    x0, noise = draw(len(values), seed)
    together = flow.add_noise(x0, noise, time(values))
    for i, sigma in enumerate(values):
        s = sigma * 1000 / 1000
        assert torch.allclose(together[i], (1 - s) * x0[i] + s * noise[i], atol=1e-15)


def test_add_noise_is_exact_at_both_ends():
    x0, noise = draw(2, 3, torch.float32)
    x_t = flow.add_noise(x0, noise, torch.tensor([0.0, 1000.0]))
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[1], noise[1])


def test_sixteen_bit_latents_are_widened_first():
    """In bf16 the sum would be off by 2^-8; the conversion must happen in fp32."""
    x0, noise = (value.bfloat16() for value in draw(1, 5, torch.float32))
    t = torch.tensor([333.0])
    x_t = flow.add_noise(x0, noise, t)
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t, flow.add_noise(x0.float(), noise.float(), t))
    assert torch.equal(flow.target(x0, noise, t), noise.float() - x0.float())
    assert torch.equal(flow.guide(x0, noise, 3.0), flow.guide(x0.float(), noise.float(), 3.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_rounded_times_are_refused(dtype):
    x0, noise = draw(1, 0)
    with pytest.raises(ContractError, match="float32"):
        flow.add_noise(x0, noise, torch.tensor([500], dtype=dtype))


def test_a_time_of_another_shape_is_refused():
    x0, noise = draw(3, 0)
    with pytest.raises(ContractError, match="one time a sample"):
        flow.add_noise(x0, noise, torch.tensor([500.0]))


def test_conversions_without_an_answer_are_refused():
    x_t, pred = draw(2, 0)
    with pytest.raises(ValueError, match="t = 0"):
        flow.pred_to_v(pred, x_t, time([0.0, 0.5]), "x0")
    with pytest.raises(ValueError, match="t = 1000"):
        flow.pred_to_v(pred, x_t, time([0.5, 1.0]), "eps")
    with pytest.raises(ValueError, match="t = 1000"):
        flow.pred_to_x0(pred, x_t, time([0.5, 1.0]), "eps")
