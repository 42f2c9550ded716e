"""Clips, guidance and conditions of the adapters are those of the stock pipelines, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distill_adapters_hunyuan import (
    HUNYUAN_VIDEO15_PLUGIN,
    HUNYUAN_VIDEO_PLUGIN,
    HunyuanVideo15Config,
    HunyuanVideoConfig,
)
from distill_protocols import RoleSpec, SamplerSpec
from PIL import Image

PROMPTS = ['a "left" seven', "moving"]
NEGATIVE = "left a"
CLIP = {"num_frames": 9, "height": 32, "width": 48}
PICTURED = {"num_frames": 9, "height": 32, "width": 32}
LENGTHS = {"max_sequence_length": 12, "glyph_sequence_length": 10}
STEPS, W = 3, 3.0


def load(version, folder, **config):
    """Load a teacher of a version, and its adapter."""
    if version == "video":
        plugin, options = HUNYUAN_VIDEO_PLUGIN, HunyuanVideoConfig(**CLIP, **config)
    else:
        size = CLIP if version == "t2v" else PICTURED
        plugin = HUNYUAN_VIDEO15_PLUGIN
        options = HunyuanVideo15Config(**size, **LENGTHS, **config)
    role = RoleSpec(name="teacher", path=str(folder), trainable=False)
    bundle = plugin.load([role], options, device=torch.device("cpu"))
    return plugin.adapter(bundle, options, source=str(folder))


def picture(height, width):
    """Return a random picture of 8 bits, for PIL and as a tensor [1, 3, H, W] in [0, 1]."""
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def prepare(pipeline, *, guidance):
    """Give a pipeline of 1.5 the lengths of the run, and its guidance."""
    pipeline.tokenizer_max_length = LENGTHS["max_sequence_length"]
    pipeline.tokenizer_2_max_length = LENGTHS["glyph_sequence_length"]
    pipeline.guider.guidance_scale = guidance


def check_clips(adapter, pipeline, cond, negative, w, **call):
    """Compare latents and clips from the same noise."""
    noise = torch.randn(
        len(cond), *adapter.latent_shape, generator=torch.Generator().manual_seed(1)
    )

    def run(kind):
        return pipeline(
            latents=noise.clone(), num_inference_steps=STEPS, output_type=kind, return_dict=False,
            **call,
        )[0]  # fmt: skip

    theirs = run("latent")
    levels = tuple((1000 * pipeline.scheduler.sigmas[:-1].double()).tolist())
    spec = SamplerSpec(steps=STEPS, timesteps=levels, guidance=w)
    latents = adapter.sample("teacher", spec, noise, cond, neg_cond=negative)
    assert torch.equal(latents, theirs)
    assert latents.std() > 0.3
    assert torch.equal(adapter.decode(latents), run("pt").permute(0, 2, 1, 3, 4))


@torch.no_grad()
@pytest.mark.parametrize("w", [1.0, 3.0])
def test_hunyuan_video(hunyuan_folder, stock, w):
    """Guidance is 1000 w in one call; without guidance that of the config."""
    pipeline = stock("video")
    adapter = load("video", hunyuan_folder("video"), embedded_guidance=2.0, max_sequence_length=12)
    cond = adapter.encode_condition(PROMPTS)
    text, pooled, mask = pipeline.encode_prompt(PROMPTS, max_sequence_length=12)
    read = cond.tensors["text_mask"] > 0
    assert torch.equal(mask.float(), cond.tensors["text_mask"])
    assert torch.equal(text[read], cond.tensors["text"][read])
    assert torch.equal(pooled, cond.tensors["pooled"])
    assert 0 < read.sum() < read.numel()
    call = {"prompt": PROMPTS, "max_sequence_length": 12, **CLIP}
    check_clips(adapter, pipeline, cond, None, w, guidance_scale=2.0 if w == 1 else w, **call)


@torch.no_grad()
@pytest.mark.parametrize("w", [1.0, 3.0])
def test_hunyuan_video_15_from_text(hunyuan_folder, stock, w):
    pipeline = stock("t2v")
    prepare(pipeline, guidance=w)
    adapter = load("t2v", hunyuan_folder("t2v"))
    cond, negative = adapter.encode_condition(PROMPTS), adapter.encode_neg_condition(NEGATIVE)
    text, mask, glyphs, glyph_mask = pipeline.encode_prompt(PROMPTS, batch_size=2)
    assert torch.equal(mask.float(), cond.tensors["text_mask"])
    assert torch.equal(glyph_mask.float(), cond.tensors["glyph_mask"])
    assert torch.equal(text[mask > 0], cond.tensors["text"][mask > 0])
    assert torch.equal(glyphs[glyph_mask > 0], cond.tensors["glyphs"][glyph_mask > 0])
    assert glyph_mask.sum(dim=1).tolist()[1] == 0 < glyph_mask.sum()
    # One clip: the VAE of diffusers 0.42.1 decodes no two.
    call = {"prompt": PROMPTS[0], "negative_prompt": NEGATIVE, **CLIP}
    check_clips(adapter, pipeline, adapter.encode_condition(PROMPTS[:1]), negative, w, **call)


@pytest.mark.parametrize("version", ["i2v", "i2v-step-distilled"])
def test_hunyuan_video_15_from_a_picture(hunyuan_folder, stock, version):
    """The step-distilled model reads the next time too."""
    pipeline = stock(version)
    prepare(pipeline, guidance=W)
    adapter = load(version, hunyuan_folder(version))
    image, pixels = picture(32, 32)
    cond = adapter.images.with_image(adapter.encode_condition(PROMPTS[:1]), pixels)
    negative = adapter.encode_neg_condition(NEGATIVE)
    call = {"prompt": PROMPTS[0], "negative_prompt": NEGATIVE, "image": image, "num_frames": 9}
    check_clips(adapter, pipeline, cond, negative, W, **call)
