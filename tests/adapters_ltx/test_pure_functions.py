"""Packing, positions and rescaled guidance against the pipeline's own."""

from __future__ import annotations

import pytest
import torch
from diffusers import LTXPipeline
from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed
from diffusers.pipelines.ltx.pipeline_ltx import rescale_noise_cfg
from distill_adapters_ltx.adapter import token_positions
from distill_adapters_ltx.published import STRIDE_HW, STRIDE_T
from distill_diffusers.calls.flow import rescale_guidance
from distill_diffusers.calls.tokens import pack, unpack
from hypothesis import given
from hypothesis import strategies as st

seeds = st.integers(0, 2**31)
small = st.integers(1, 4)
sizes = st.tuples(small, small, small)
rates = st.floats(1, 120) | st.integers(1, 120)
CPU = torch.device("cpu")


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- packing --------------------------------------------------------------------------------------


@given(sizes, small, small, seeds)
def test_packing_equals_the_pipelines_and_can_be_undone(size, batch, channels, seed):
    latents = draw(seed, batch, channels, *size)
    tokens = pack(latents)
    assert torch.equal(tokens, LTXPipeline._pack_latents(latents))
    assert tokens.data_ptr() == latents.data_ptr()
    back = unpack(tokens, size)
    assert torch.equal(back, latents)
    assert torch.equal(back, LTXPipeline._unpack_latents(tokens, *size))


def test_tokens_of_another_size_are_refused():
    with pytest.raises(RuntimeError, match="don't multiply up"):
        unpack(torch.zeros(1, 12, 8), (2, 2, 2))


# -- positions ------------------------------------------------------------------------------------


@given(sizes, rates)
def test_positions_are_what_the_transformer_makes_of_an_interpolation_scale(size, rate):
    rope, tokens = LTXVideoRotaryPosEmbed(dim=32), torch.zeros(1, 1, 32)
    positions = token_positions(size, rate, device=CPU)
    assert positions.shape == (1, 3, size[0] * size[1] * size[2])
    scale = (STRIDE_T / rate, STRIDE_HW, STRIDE_HW)
    theirs = rope(tokens, *size, rope_interpolation_scale=scale)
    ours = rope(tokens, video_coords=positions)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_positions_count_seconds_and_pixels_in_the_order_of_the_tokens():
    positions = token_positions((3, 2, 1), 8, device=CPU)[0]
    assert positions[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert positions[1].tolist() == [0, 32, 0, 32, 0, 32]
    # A token's place in the packed latents is its place here.
    latents = positions.reshape(1, 3, 3, 2, 1)
    assert torch.equal(pack(latents)[0].T, positions)


# -- guidance -------------------------------------------------------------------------------------


@given(st.floats(0, 1), seeds)
def test_rescaled_guidance_is_the_pipelines(factor, seed):
    guided, cond = draw(seed, 3, 4, 6), draw(seed + 1, 3, 4, 6)
    rescaled = rescale_guidance(guided, cond, factor)
    assert torch.equal(rescaled, rescale_noise_cfg(guided, cond, factor))
    alone = torch.cat(
        [rescale_guidance(guided[i : i + 1], cond[i : i + 1], factor) for i in range(3)]
    )
    assert torch.allclose(alone, rescaled, atol=1e-6)


@given(sizes, seeds)
def test_rescaling_reads_latents_as_it_reads_tokens(size, seed):
    guided, cond = draw(seed, 2, 3, *size), draw(seed + 1, 2, 3, *size)
    tokens = rescale_guidance(pack(guided), pack(cond), 0.7)
    assert torch.allclose(pack(rescale_guidance(guided, cond, 0.7)), tokens, atol=1e-5)


def test_the_ends_of_rescaling():
    guided, cond = draw(1, 2, 3, 8), 3 * draw(2, 2, 3, 8)
    assert torch.equal(rescale_guidance(guided, cond, 0.0), guided)
    full = rescale_guidance(guided, cond, 1.0)
    assert torch.allclose(full.std(dim=(1, 2)), cond.std(dim=(1, 2)))
