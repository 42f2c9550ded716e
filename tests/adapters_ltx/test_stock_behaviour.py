"""What an adapter counts on, or must avoid, in the stock models and pipelines."""

from __future__ import annotations

import hashlib
from pathlib import Path

import ltx_pipelines
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
from distill_adapters_ltx.adapter import token_positions
from distill_diffusers.calls.tokens import pack
from distill_protocols import SamplerSpec

SIZE = (3, 2, 3)
CLIP = {"num_frames": 17, "height": 64, "width": 96}
EVERY = pytest.mark.parametrize("version", ltx_pipelines.VERSIONS)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@EVERY
@torch.no_grad()
def test_the_stock_pipeline_samples_the_tiny_folder(stock, version):
    torch.manual_seed(0)
    clips = [
        stock(version)(
            prompt=prompt,
            **CLIP,
            num_inference_steps=4,
            generator=seeded(0),
            output_type="np",
            decode_timestep=0.05,
            decode_noise_scale=0.025,
        ).frames
        for prompt in ("a seven moving left", "moving")
    ]
    assert all(clip.shape == (1, 17, 64, 96, 3) and clip.std() > 0.05 for clip in clips)
    assert np.abs(clips[0] - clips[1]).max() > 1e-3  # the prompt is read


@EVERY
@torch.no_grad()
def test_the_tiny_vae_compresses_as_the_published_ones_do(stock, version):
    vae = stock(version).vae
    clip = torch.rand(2, 3, 17, 64, 96, generator=seeded(1)) * 2 - 1
    latents = vae.encode(clip).latent_dist.mode()
    assert latents.shape == (2, 8, *SIZE)
    assert (vae.temporal_compression_ratio, vae.spatial_compression_ratio) == (8, 32)
    # The encoder is causal: a latent frame knows no later ones.
    for frames, latent_frames in ((1, 1), (9, 2)):
        start = vae.encode(clip[:, :, :frames]).latent_dist.mode()
        assert torch.allclose(start, latents[:, :, :latent_frames], atol=1e-5)


@EVERY
def test_the_tiny_folder_is_small_and_the_same_each_time(folder_of, tmp_path, stock, version):
    again = ltx_pipelines.build(tmp_path / "again", version)
    assert hashes(again) == hashes(folder_of(version))
    pipeline = stock(version)
    modules = (pipeline.transformer, pipeline.vae, pipeline.text_encoder)
    count = sum(p.numel() for module in modules for p in module.parameters())
    assert 60_000 < count < 200_000


def hashes(folder: Path):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


# -- text -----------------------------------------------------------------------------------------


def call(transformer, mask, embeds, t=(640.0, 250.0)):
    x = pack(torch.randn(2, 8, *SIZE, generator=seeded(2)))
    positions = token_positions(SIZE, 25, device=torch.device("cpu"))
    with torch.no_grad():
        return transformer(
            hidden_states=x,
            encoder_hidden_states=embeds,
            timestep=torch.tensor(t),
            encoder_attention_mask=mask,
            video_coords=positions.expand(2, -1, -1),
            return_dict=False,
        )[0]


def test_embeddings_of_masked_tokens_have_no_effect(stock):
    """Stored embeddings may therefore be zero there. The mask itself must be stored."""
    transformer = stock().transformer
    embeds = torch.randn(2, 8, 16, generator=seeded(3))
    mask = torch.arange(8) < torch.tensor([[5], [2]])
    cleared = torch.where(mask[..., None], embeds, 0.0)
    masked = call(transformer, mask, embeds)
    assert torch.equal(call(transformer, mask, cleared), masked)
    assert torch.equal(call(transformer, mask.float(), embeds), masked)
    full = call(transformer, torch.ones_like(mask), embeds)
    assert (full - masked).abs().max() > 1e-3
    assert torch.equal(call(transformer, None, embeds), full)
    with pytest.raises(TypeError, match="encoder_attention_mask"):
        transformer(
            hidden_states=torch.zeros(2, 18, 8),
            encoder_hidden_states=embeds,
            timestep=torch.ones(2),
        )


@torch.no_grad()
def test_the_length_of_the_padding_matters_to_one_pipeline_alone(stock):
    """LTXPipeline's text encoder attends it; LTXConditionPipeline's does not."""

    def embeds(pipeline, length):
        return pipeline.encode_prompt("a", None, False, max_sequence_length=length)[0][:, :2]

    first, second = (embeds(stock("0.9.0"), length) for length in (8, 32))
    assert (first - second).abs().max() > 1e-2
    first, second = (embeds(stock("0.9.7"), length) for length in (8, 32))
    assert torch.allclose(first, second, atol=1e-6)


# -- time -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_time_for_each_token(stock):
    """Image-to-video passes [B, L]. Equal times give the result of [B], up to rounding."""
    transformer = stock().transformer
    embeds = torch.randn(2, 8, 16, generator=seeded(3))
    one = call(transformer, None, embeds)
    each = call(transformer, None, embeds, t=[[640.0] * 18, [250.0] * 18])
    assert torch.allclose(one, each, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 16.17])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 50])
def test_a_static_scheduler_makes_the_sigmas_of_a_sampler_with_that_shift(steps, shift):
    """LTXPipeline passes linspace(1, 1 / N, N). Some sigmas differ by one fp32 step, so an export
    that must agree bit for bit samples with the scheduler's own numbers."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps))
    expected = torch.tensor([*SamplerSpec(steps=steps, shift=shift).sigmas(), 0.0])
    assert torch.allclose(scheduler.sigmas, expected, rtol=0, atol=2e-7)


def test_shift_terminal_breaks_a_single_step(stock):
    """It divides by 1 - sigma = 0, so the scheduler of a one-step export must not have it."""
    pipeline = stock("0.9.0")
    with pytest.warns(RuntimeWarning, match="invalid value"), pytest.raises(IndexError):
        pipeline(prompt="a", **CLIP, num_inference_steps=1, output_type="latent")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    frames = pipeline(prompt="a", **CLIP, num_inference_steps=1, output_type="latent").frames
    assert torch.isfinite(frames).all()


def test_ltx_pipeline_takes_no_timesteps(stock):
    """It passes its own sigmas in any case, so the argument ``timesteps`` always fails."""
    with pytest.raises(ValueError, match="Only one of `timesteps` or `sigmas`"):
        stock()(prompt="a", **CLIP, timesteps=[1000, 700])


# -- training -------------------------------------------------------------------------------------


def test_checkpointed_gradients_are_the_same(folder_of):
    def gradients(checkpointed):
        transformer = LTXVideoTransformer3DModel.from_pretrained(folder_of("0.9.0") / "transformer")
        if checkpointed:
            transformer.enable_gradient_checkpointing()
        out = transformer.train()(
            hidden_states=torch.randn(2, 18, 8, generator=seeded(4)),
            encoder_hidden_states=torch.randn(2, 8, 16, generator=seeded(5)),
            timestep=torch.tensor([640.0, 250.0]),
            encoder_attention_mask=torch.ones(2, 8),
            num_frames=3,
            height=2,
            width=3,
            rope_interpolation_scale=(8 / 25, 32, 32),
        ).sample
        out.square().mean().backward()
        return {name: p.grad for name, p in transformer.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_no_module_stays_in_fp32(folder_of):
    """Some of Wan's modules do. There is no buffer either, whose device one could ask for."""
    transformer = LTXVideoTransformer3DModel.from_pretrained(
        folder_of("0.9.0") / "transformer", dtype=torch.bfloat16
    )
    assert {p.dtype for p in transformer.parameters()} == {torch.bfloat16}
    assert not list(transformer.buffers())
