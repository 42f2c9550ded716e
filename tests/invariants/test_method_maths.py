"""Invariant 3 of the methods' maths, for any numbers (algorithms.md, section 7)."""

from __future__ import annotations

import torch
from distill_methods import TimeSampling
from distill_methods.maths import dmd_gradient, dmd_loss, sample_timesteps, velocity_loss
from distill_protocols import RowGenerators
from hypothesis import given
from hypothesis import strategies as st

seeds = st.integers(0, 2**32)
batches = st.integers(1, 5)
scales = st.floats(1e-3, 1e3)


def triple(seed: int, batch: int, scale: float = 1.0) -> torch.Tensor:
    """x, f and r [3, B, 2, 1, 2, 3] in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(3, batch, 2, 1, 2, 3, generator=generator, dtype=torch.float64)


@given(seeds, batches, scales)
def test_a_critic_equal_to_the_teacher_gives_no_gradient(seed: int, batch: int, scale: float):
    x, f, _ = triple(seed, batch, scale)
    assert torch.equal(dmd_gradient(x, f, f), torch.zeros_like(x))


@given(seeds, batches, scales)
def test_the_student_gets_the_gradient_g_over_numel(seed: int, batch: int, scale: float):
    x, f, r = triple(seed, batch, scale)
    x.requires_grad_()
    g = dmd_gradient(x, f, r)
    dmd_loss(x, g).backward()
    torch.testing.assert_close(x.grad, g / g.numel(), rtol=1e-6, atol=1e-9)


@given(seeds, st.integers(2, 5), st.data(), scales)
def test_a_samples_gradient_does_not_depend_on_its_neighbours(seed, batch, data, scale):
    x, f, r = triple(seed, batch)
    i = data.draw(st.integers(0, batch - 1))
    alone = dmd_gradient(x[i : i + 1], f[i : i + 1], r[i : i + 1])
    others = torch.arange(batch) != i
    for value in (x, f, r):
        value[others] *= scale
    torch.testing.assert_close(dmd_gradient(x, f, r)[i : i + 1], alone, rtol=1e-12, atol=0)


@given(seeds, batches, scales)
def test_the_gradient_does_not_depend_on_the_scale_of_all_three(seed, batch, scale):
    x, f, r = triple(seed, batch)
    torch.testing.assert_close(
        dmd_gradient(scale * x, scale * f, scale * r), dmd_gradient(x, f, r), rtol=1e-9, atol=1e-12
    )


@given(seeds, batches)
def test_following_the_gradient_with_an_exact_critic_leads_to_the_teacher(seed, batch):
    """With f = x, a step of one normaliser against g lands on r: the sign is right."""
    x, _, r = triple(seed, batch)
    n = (x - r).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(x - n * dmd_gradient(x, x, r), r)


@given(seeds, batches)
def test_the_loss_of_a_batch_is_the_mean_of_its_samples(seed, batch):
    x, f, r = triple(seed, batch)
    weight = torch.rand(batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    samples = [slice(i, i + 1) for i in range(batch)]
    dmd = torch.stack([dmd_loss(x[i], dmd_gradient(x[i], f[i], r[i])) for i in samples])
    torch.testing.assert_close(dmd_loss(x, dmd_gradient(x, f, r)), dmd.mean())
    velocity = torch.stack([velocity_loss(f[i], r[i], weight[i]) for i in samples])
    torch.testing.assert_close(velocity_loss(f, r, weight), velocity.mean())


@given(seeds, st.sampled_from(["uniform", "logit_normal"]), st.floats(0.2, 12.0), st.data())
def test_drawn_times_stay_in_their_range_and_grow_with_the_shift(seed, distribution, shift, data):
    low = data.draw(st.floats(0, 900))
    high = data.draw(st.floats(low + 1, 1000))

    def draw(shift: float) -> torch.Tensor:
        time = TimeSampling(distribution=distribution, shift=shift, t_min=low, t_max=high)
        return sample_timesteps(time, RowGenerators.seeded(seed, "t", range(64)))

    t = draw(shift)
    assert t.shape == (64,)
    assert t.dtype == torch.float32
    assert ((t >= torch.tensor(low)) & (t <= torch.tensor(high))).all()
    assert (draw(1.5 * shift) >= t).all()
