"""The latents and pictures of StableDiffusion3Pipeline, computed step by step without it.

It shows how an adapter must call the models. On the CPU in fp32 every bit agrees.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sd3_pipelines import CLIP_TOKENS, TEXT_WIDTH, VERSIONS

HEIGHT, WIDTH = 32, 48
LATENTS = (2, 4, 1, 4, 6)  # B, C, T, H, W
PROMPTS, NEGATIVES = ["a seven moving left", "a"], ["moving", ""]
LENGTH, STEPS, SHIFT = 8, 5, 3.0

each_version = pytest.mark.parametrize("version", VERSIONS)


def encode(pipeline, prompts):
    """Encode prompts to text [B, CLIP_TOKENS + LENGTH, TEXT_WIDTH] and pooled [B, P]."""
    hidden, pooled = [], []
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        output = encoder(tokenize(tokenizer, prompts, CLIP_TOKENS), output_hidden_states=True)
        hidden.append(output.hidden_states[-2])  # before the last layer, and not normalised
        pooled.append(output.text_embeds)  # projected
    clip = torch.cat(hidden, dim=-1)
    clip = torch.nn.functional.pad(clip, (0, TEXT_WIDTH - clip.shape[-1]))
    t5 = torch.zeros(len(prompts), LENGTH, TEXT_WIDTH)
    if pipeline.text_encoder_3 is not None:
        # Without a mask: it attends its padding, and so does the transformer.
        t5 = pipeline.text_encoder_3(tokenize(pipeline.tokenizer_3, prompts, LENGTH))[0]
    return torch.cat([clip, t5], dim=1), torch.cat(pooled, dim=-1)


def tokenize(tokenizer, prompts, length):
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def shifted(u):
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def stock_sigmas(steps):
    """Compute sigma of each call and the final 0: the last is shifted twice from 1/1000."""
    low = shifted(torch.tensor(1.0) / 1000).item()
    grid = np.linspace(1000.0, low * 1000, steps) / 1000
    return torch.cat([torch.from_numpy(shifted(grid)).float(), torch.zeros(1)])


def walk(pipeline, noise, sigmas, positive, negative, w):
    """Yield x [B, C, 1, H, W] after each step; guidance in one call of 2B, negatives first."""
    text, pooled = (
        torch.cat(pair) if w > 1 else pair[1] for pair in zip(negative, positive, strict=True)
    )
    x = noise
    for sigma, after in itertools.pairwise(sigmas):
        v = pipeline.transformer(
            hidden_states=torch.cat([x, x] if w > 1 else [x]).squeeze(2),
            timestep=(sigma * 1000).expand(len(text)),  # never rounded
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0].unsqueeze(2)
        if w > 1:
            uncond, cond = v.chunk(2)
            v = uncond + w * (cond - uncond)
        x = x + (after - sigma) * v
        yield x


def draw(seed=0):
    return torch.randn(LATENTS, generator=torch.Generator().manual_seed(seed))


def sample(pipeline, w=3.0, **call):
    """Call the pipeline; return the latents [B, C, H, W] after each step, and its output."""
    after_steps = []

    def keep(_pipeline, _step, _t, tensors):
        after_steps.append(tensors["latents"].clone())
        return {}

    images = pipeline(
        PROMPTS,
        negative_prompt=NEGATIVES,
        height=HEIGHT,
        width=WIDTH,
        max_sequence_length=LENGTH,
        guidance_scale=w,
        callback_on_step_end=keep,
        **{"num_inference_steps": STEPS, "output_type": "latent", **call},
    ).images
    return after_steps, images


@each_version
@torch.no_grad()
def test_conditions(stock, version):
    pipeline = stock(version)
    theirs = pipeline.encode_prompt(
        PROMPTS, None, None, negative_prompt=NEGATIVES, max_sequence_length=LENGTH
    )
    ours = [*zip(encode(pipeline, PROMPTS), encode(pipeline, NEGATIVES), strict=True)]
    for one, other in zip(itertools.chain(*ours), theirs, strict=True):
        assert torch.equal(one, other)
        assert (one[0] - one[1]).abs().max() > 0.1  # the prompts differ


@pytest.mark.parametrize("w", [1.0, 3.0])
@each_version
@torch.no_grad()
def test_every_step(stock, version, w):
    pipeline, noise = stock(version), draw()
    theirs, latents = sample(pipeline, w, latents=noise.squeeze(2))
    positive, negative = encode(pipeline, PROMPTS), encode(pipeline, NEGATIVES)
    sigmas = stock_sigmas(STEPS)
    assert torch.equal(sigmas, pipeline.scheduler.sigmas)
    ours = list(walk(pipeline, noise, sigmas, positive, negative, w))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.squeeze(2), other)
    assert torch.equal(ours[-1].squeeze(2), latents)
    assert (ours[-1] - noise).abs().max() > 0.1


@torch.no_grad()
def test_sigmas_of_an_even_grid_are_met_by_passing_them(stock):
    """What SamplerSpec calls shift: S_k(1 - i/N), which ends far above stock's last sigma."""
    pipeline = stock()
    even = [1 - i / STEPS for i in range(STEPS)]
    sample(pipeline, sigmas=even)
    expected = shifted(torch.tensor(even, dtype=torch.float64)).float()
    assert torch.allclose(pipeline.scheduler.sigmas[:-1], expected, rtol=0, atol=1e-7)
    assert expected[-1] > 0.4
    assert stock_sigmas(STEPS)[-2] < 0.01


@torch.no_grad()
def test_pictures(stock):
    pipeline = stock()
    theirs, images = sample(pipeline, output_type="np", num_inference_steps=2)
    vae = pipeline.vae
    raw = theirs[-1] / vae.config.scaling_factor + vae.config.shift_factor
    ours = (vae.decode(raw).sample * 0.5 + 0.5).clamp(0, 1)
    assert np.array_equal(images, ours.permute(0, 2, 3, 1).numpy())
    assert images.shape == (2, HEIGHT, WIDTH, 3)
    assert images.std() > 0.05
    # A standard deviation in place of the factor rounds otherwise, and no more than that.
    other = theirs[-1] * (1 / vae.config.scaling_factor) + vae.config.shift_factor
    assert torch.allclose(raw, other, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_the_noise_that_the_pipeline_draws(stock):
    pipeline = stock()
    _, theirs = sample(pipeline, generator=torch.Generator().manual_seed(3))
    _, ours = sample(pipeline, latents=draw(seed=3).squeeze(2))
    assert torch.equal(theirs, ours)


def test_the_last_block_has_weights_that_change_nothing(stock):
    """Its text queries: the text that would come out of it is thrown away."""
    from copy import deepcopy

    pipeline = stock("3.5-medium")
    transformer = deepcopy(pipeline.transformer)
    with torch.no_grad():
        text, pooled = encode(pipeline, PROMPTS)
    v = transformer(draw().squeeze(2), text, pooled, torch.tensor([900.0, 100.0])).sample
    v.square().sum().backward()
    idle = {name for name, p in transformer.named_parameters() if not p.grad.any()}
    last = "transformer_blocks.1.attn."
    assert idle == {
        last + name for name in ("add_q_proj.weight", "add_q_proj.bias", "norm_added_q.weight")
    }
