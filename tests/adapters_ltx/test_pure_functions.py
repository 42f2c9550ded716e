"""Packing, normalisation, positions and rescaled guidance against the pipelines' own."""

from __future__ import annotations

import pytest
import torch
from diffusers import LTXConditionPipeline, LTXPipeline
from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed
from diffusers.pipelines.ltx.pipeline_ltx import rescale_noise_cfg
from distill_adapters_ltx.arithmetic import (
    denormalize,
    normalize,
    pack,
    rescale_guidance,
    token_positions,
    unpack,
)
from distill_adapters_ltx.published import STRIDE_HW, STRIDE_T
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
def test_packing_is_the_pipelines_and_comes_back(size, batch, channels, seed):
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


# -- normalisation --------------------------------------------------------------------------------


@given(st.floats(0.1, 3), st.sampled_from([torch.float32, torch.bfloat16]), seeds)
def test_normalisation_is_the_pipelines_and_comes_back(factor, dtype, seed):
    raw = draw(seed, 2, 5, 2, 3, 2, dtype=dtype)
    mean, std = draw(seed + 1, 5), draw(seed + 2, 5).abs() + 0.1
    latents = normalize(raw, mean, std, factor)
    assert torch.equal(latents, LTXPipeline._normalize_latents(raw, mean, std, factor))
    back = denormalize(latents, mean, std, factor)
    assert torch.equal(back, LTXPipeline._denormalize_latents(latents, mean, std, factor))
    assert back.dtype == latents.dtype == dtype
    # Where the mean is large beside the latents, its rounding is what comes back.
    scale = raw.abs().max() + mean.abs().max()
    assert (back - raw).abs().max() <= 8 * torch.finfo(dtype).eps * scale


# -- positions ------------------------------------------------------------------------------------


@given(sizes, rates)
def test_even_positions_are_what_the_transformer_makes_of_an_interpolation_scale(size, rate):
    rope, tokens = LTXVideoRotaryPosEmbed(dim=32), torch.zeros(1, 1, 32)
    positions = token_positions(size, rate, causal=False, device=CPU)
    assert positions.shape == (1, 3, size[0] * size[1] * size[2])
    scale = (STRIDE_T / rate, STRIDE_HW, STRIDE_HW)
    theirs = rope(tokens, *size, rope_interpolation_scale=scale)
    ours = rope(tokens, video_coords=positions)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@given(sizes, rates)
def test_causal_positions_are_those_of_ltx_condition_pipeline(size, rate):
    ids = LTXConditionPipeline._prepare_video_ids(1, *size)
    theirs = LTXConditionPipeline._scale_video_ids(ids, STRIDE_HW, STRIDE_T).float()
    theirs[:, 0] = theirs[:, 0] * (1.0 / rate)
    assert torch.equal(token_positions(size, rate, causal=True, device=CPU), theirs)


def test_positions_count_seconds_and_pixels_in_the_order_of_the_tokens():
    positions = token_positions((3, 2, 1), 8, causal=False, device=CPU)[0]
    assert positions[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert positions[1].tolist() == [0, 32, 0, 32, 0, 32]
    causal = token_positions((3, 2, 1), 8, causal=True, device=CPU)[0]
    assert causal[0].tolist() == [0, 0, 1 / 8, 1 / 8, 9 / 8, 9 / 8]
    assert torch.equal(causal[1:], positions[1:])
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
    whole = rescale_guidance(guided, cond, 1.0)
    assert torch.allclose(whole.std(dim=(1, 2)), cond.std(dim=(1, 2)))
