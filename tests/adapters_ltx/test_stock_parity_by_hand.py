"""The latents and clips of the stock pipelines, computed step by step without them.

This says how an adapter must call the models. On the CPU in fp32 every bit agrees.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from distill_adapters_ltx.arithmetic import (
    denormalize,
    pack,
    rescale_guidance,
    token_positions,
    unpack,
)

FRAMES, HEIGHT, WIDTH, FRAME_RATE = 17, 64, 96, 24
SIZE = (3, 2, 3)  # latent frames, height and width
PROMPTS, NEGATIVES = ["a seven moving left", "a"], ["moving", ""]
LENGTH, STEPS, W = 8, 5, 3.0
CLIP = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "frame_rate": FRAME_RATE}
TEXT = {"prompt": PROMPTS, "negative_prompt": NEGATIVES, "max_sequence_length": LENGTH}


def encode(pipeline, prompts, *, mask_padding):
    """Encode prompts to embeddings [B, L, D] and a mask [B, L], True at text."""
    tokens = pipeline.tokenizer(
        prompts,
        padding="max_length",
        max_length=LENGTH,
        truncation=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    mask = tokens.attention_mask.bool()
    # LTXPipeline lets the encoder attend the padding; the transformer never does.
    given = {"attention_mask": mask} if mask_padding else {}
    return pipeline.text_encoder(tokens.input_ids, **given)[0], mask


def dynamic_sigmas(steps, tokens):
    """Compute sigma of each call and the final 0, as the scheduler of 0.9.0 and 0.9.1 does."""
    mu = 0.95 + (2.05 - 0.95) / (4096 - 1024) * (tokens - 1024)
    grid = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    shifted = math.exp(mu) / (math.exp(mu) + (1 / grid - 1))
    kept = 1 - shifted
    stretched = 1 - kept / (kept[-1] / (1 - 0.1))
    return torch.cat([torch.from_numpy(stretched), torch.zeros(1)])


def static_sigmas(steps):
    """Compute the sigmas of 0.9.5: shift 1, and no stretch to a last sigma."""
    grid = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    return torch.cat([torch.from_numpy(grid), torch.zeros(1)])


def linear_quadratic_sigmas(steps, threshold=0.025):
    """Compute LTXConditionPipeline's: half of the steps from 1 to 0.975, then a parabola."""
    linear = steps // 2
    rest = steps - linear
    first = [i * threshold / linear for i in range(linear)]
    excess = linear - threshold * steps
    a = excess / (linear * rest**2)
    b = threshold / linear - 2 * excess / rest**2
    second = [a * i**2 + b * i + a * linear**2 for i in range(linear, steps)]
    return torch.tensor([1.0 - x for x in first + second] + [0.0])


def walk(pipeline, noise, sigmas, text, positions, *, rescale=0.0):
    """Yield x [B, L, D] after each step; guidance in one call of 2B, negative prompts first."""
    positive, negative = text
    embeds = torch.cat([negative[0], positive[0]])
    mask = torch.cat([negative[1], positive[1]])
    x = pack(noise)
    for sigma, after in itertools.pairwise(sigmas):
        v = pipeline.transformer(
            hidden_states=torch.cat([x, x]),
            encoder_hidden_states=embeds,
            timestep=(sigma * 1000).expand(len(embeds)),  # never rounded
            encoder_attention_mask=mask,
            video_coords=positions.expand(len(embeds), -1, -1),
            return_dict=False,
        )[0].float()
        uncond, cond = v.chunk(2)
        v = uncond + W * (cond - uncond)
        if rescale:
            v = rescale_guidance(v, cond, rescale)
        x = x + (after - sigma) * v
        yield x


def decode(vae, latents, decode_timestep, decode_noise_scale, generator):
    """Decode to clips [B, F, H, W, 3] in [0, 1], as ``output_type="np"`` does."""
    raw = denormalize(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    time = None
    if vae.config.timestep_conditioning:
        noise = torch.randn(raw.shape, generator=generator)
        raw = (1 - decode_noise_scale) * raw + decode_noise_scale * noise
        time = torch.full((len(raw),), decode_timestep)  # sigma; the decoder multiplies by 1000
    pixels = vae.decode(raw, time, return_dict=False)[0]
    return (pixels * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)


def draw(seed=0):
    return torch.randn(2, 8, *SIZE, generator=torch.Generator().manual_seed(seed))


def even(causal=False):
    return token_positions(SIZE, FRAME_RATE, causal=causal, device=torch.device("cpu"))


def sampled(pipeline, **given):
    """Call the pipeline; return the packed latents after each step, and its frames."""
    seen = []

    def keep(_pipeline, _step, _t, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    frames = pipeline(**CLIP, **TEXT, guidance_scale=W, callback_on_step_end=keep, **given).frames
    return seen, frames


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("version", ["0.9.0", "0.9.1", "0.9.5"])
@torch.no_grad()
def test_every_step_of_ltx_pipeline(stock, version, rescale):
    pipeline, noise = stock(version), draw()
    theirs, latents = sampled(
        pipeline,
        latents=pack(noise),  # tokens: the pipeline packs only what it draws itself
        num_inference_steps=STEPS,
        guidance_rescale=rescale,
        output_type="latent",
    )
    text = [encode(pipeline, side, mask_padding=False) for side in (PROMPTS, NEGATIVES)]
    tokens = math.prod(SIZE)
    sigmas = static_sigmas(STEPS) if version == "0.9.5" else dynamic_sigmas(STEPS, tokens)
    assert torch.equal(sigmas, pipeline.scheduler.sigmas)
    ours = list(walk(pipeline, noise, sigmas, text, even(), rescale=rescale))
    assert len(ours) == len(theirs) == STEPS
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert torch.equal(latents, ours[-1])
    assert (ours[-1] - pack(noise)).abs().max() > 0.1


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1", "0.9.5"])
@torch.no_grad()
def test_the_decoded_clip(stock, version):
    pipeline, noise = stock(version), draw()
    ending = {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
    torch.manual_seed(5)  # 0.9.1's decoder adds noise of the global generator within its blocks
    theirs, frames = sampled(
        pipeline,
        latents=pack(noise),
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
        **ending,
    )
    torch.manual_seed(5)
    latents = unpack(theirs[-1], SIZE)
    ours = decode(pipeline.vae, latents, **ending, generator=torch.Generator().manual_seed(1))
    assert frames.shape == (2, FRAMES, HEIGHT, WIDTH, 3)
    assert np.array_equal(frames, ours.numpy())
    assert frames.std() > 0.05


@torch.no_grad()
def test_the_noise_that_ltx_pipeline_draws(stock):
    pipeline = stock()
    given = {"num_inference_steps": 2, "output_type": "latent"}
    _, theirs = sampled(pipeline, generator=torch.Generator().manual_seed(3), **given)
    _, ours = sampled(pipeline, latents=pack(draw(seed=3)), **given)
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("timesteps", [None, [1000, 993.7, 900.5, 725]])
@torch.no_grad()
def test_every_step_of_ltx_condition_pipeline(stock, timesteps):
    """It has other positions, masks the text encoder's padding, and accepts timesteps."""
    pipeline = stock("0.9.7")
    given = {"num_inference_steps": STEPS} if timesteps is None else {"timesteps": timesteps}
    generator = torch.Generator().manual_seed(0)  # at full strength it ignores ``latents``
    theirs, latents = sampled(pipeline, generator=generator, output_type="latent", **given)
    text = [encode(pipeline, side, mask_padding=True) for side in (PROMPTS, NEGATIVES)]
    sigmas = linear_quadratic_sigmas(STEPS)
    if timesteps is not None:
        sigmas = torch.tensor([t / 1000 for t in timesteps] + [0.0])
    ours = list(walk(pipeline, draw(), sigmas, text, even(causal=True)))
    assert torch.equal(sigmas, pipeline.scheduler.sigmas)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert torch.equal(latents, unpack(ours[-1], SIZE))  # not packed, unlike LTXPipeline's


@torch.no_grad()
def test_two_calls_for_guidance_round_otherwise(stock):
    """Only one call of 2B agrees bit for bit with an exported pipeline."""
    pipeline = stock()
    text = [encode(pipeline, side, mask_padding=False) for side in (PROMPTS, NEGATIVES)]
    x, positions = pack(draw()), even()

    def call(embeds, mask, x):
        return pipeline.transformer(
            hidden_states=x,
            encoder_hidden_states=embeds,
            timestep=torch.full((len(x),), 640.0),
            encoder_attention_mask=mask,
            video_coords=positions.expand(len(x), -1, -1),
            return_dict=False,
        )[0]

    both = call(*(torch.cat(pair) for pair in zip(*text, strict=True)), torch.cat([x, x]))
    apart = torch.cat([call(*side, x) for side in text])
    assert 0 < (both - apart).abs().max() < 1e-5
