"""The adapter's pictures are the stock pipeline's, and its conditions are checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from attrs import evolve
from diffusers import QwenImagePipeline
from distill_adapters_qwen_image import PLUGIN, QwenImageConfig
from distill_adapters_qwen_image.adapter import pack, rescale_to_norm, unpack
from distill_diffusers.planning.calls import measure_call
from distill_protocols import (
    Condition,
    DynamicShift,
    Precision,
    RoleSpec,
    SamplerSpec,
    WeightsError,
)
from family_fixtures import qwen_image_folder
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["qwen_image_folder"]

torch.set_num_threads(1)

CONFIG = QwenImageConfig(height=64, width=96, max_sequence_length=12)
PROMPTS, NEGATIVE = ["a seven moving left", "a"], "moving"
PUBLISHED_SHIFT = DynamicShift(
    base_tokens=256, base_mu=0.5, max_tokens=8192, max_mu=0.9, terminal=0.02
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def load(qwen_image_folder):
    def load(config=CONFIG, precision: Precision = "fp32", **options):
        folder = str(qwen_image_folder)
        role = RoleSpec(
            name="teacher", path=folder, precision=precision, **{"trainable": False, **options}
        )
        bundle = PLUGIN.load([role], config, device=CPU)
        return PLUGIN.adapter(bundle, config, source=folder)

    return load


@pytest.fixture(scope="module")
def stock(qwen_image_folder):
    pipeline = QwenImagePipeline.from_pretrained(qwen_image_folder)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        for parameter in module.parameters():
            # Out of the mapped files, where a product may round otherwise by where numbers lie.
            parameter.data = parameter.data.clone()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, 4, 1, 8, 12, generator=torch.Generator().manual_seed(seed))


def exact(spec: SamplerSpec, scheduler) -> SamplerSpec:
    """Take the scheduler's own numbers, which may be one fp32 step from those of a spec."""
    assert torch.allclose(scheduler.sigmas[:-1], torch.tensor(spec.sigmas()), rtol=0, atol=2.4e-7)
    times = tuple(1000 * float(sigma) for sigma in scheduler.sigmas[:-1].double())
    return evolve(spec, shift=1.0, timesteps=times)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("rows", [1, 2])
def test_sampled_latents_are_the_stock_pipelines(load, stock, rows, guidance):
    adapter = load()
    theirs = stock(
        prompt=PROMPTS[:rows], negative_prompt=[NEGATIVE] * rows, latents=pack(noise(rows)),
        height=64, width=96, num_inference_steps=5, true_cfg_scale=guidance, output_type="latent",
    ).images  # fmt: skip
    tokens = PLUGIN.latent_tokens(CONFIG, source=str(stock.name_or_path))
    spec = SamplerSpec(steps=5, shift=PUBLISHED_SHIFT, guidance=guidance).resolved(tokens)
    ours = adapter.sample(
        "teacher", exact(spec, stock.scheduler), noise(rows),
        adapter.encode_condition(PROMPTS[:rows]), neg_cond=adapter.encode_neg_condition(NEGATIVE),
    )  # fmt: skip
    assert torch.equal(pack(ours), theirs)
    assert theirs.std() > 0.5


def test_decoded_pictures_are_the_stock_pipelines(load, stock):
    adapter = load()
    theirs = stock(
        prompt=PROMPTS[:1], latents=pack(noise(1)), height=64, width=96, num_inference_steps=2,
        output_type="pt",
    ).images  # fmt: skip
    times = tuple((1000 * stock.scheduler.sigmas[:-1].double()).tolist())
    spec = SamplerSpec(steps=2, timesteps=times)
    latents = adapter.sample("teacher", spec, noise(1), adapter.encode_condition(PROMPTS[:1]))
    picture = adapter.decode(latents)
    assert torch.equal(picture[:, :, 0], theirs)
    assert picture.shape == (1, 3, 1, 64, 96)
    raw = adapter.encode(picture)
    mean, std = (
        torch.tensor(values).view(1, 4, 1, 1, 1)
        for values in (stock.vae.config.latents_mean, stock.vae.config.latents_std)
    )
    torch.testing.assert_close(adapter.normalize_latents(raw), (raw - mean) / std)


def test_a_condition_is_that_of_one_prompt_alone_and_zero_beyond_it(load, stock):
    adapter = load(evolve(CONFIG, max_sequence_length=8))
    cond = adapter.encode_condition(PROMPTS)
    assert cond.tensors["text_mask"].sum(dim=1).tolist() == [8, 6]  # of nine, the last is cut
    for prompt, row in zip(PROMPTS, cond.tensors["text"], strict=True):
        theirs, _ = stock.encode_prompt(prompt, max_sequence_length=8)
        assert torch.equal(row[: theirs.shape[1]], theirs[0])
        assert not row[theirs.shape[1] :].any()
    counted = PLUGIN.count_tokens(CONFIG, PROMPTS, source=str(stock.name_or_path))
    assert counted is not None
    assert (list(counted.counts), counted.limit) == ([9, 6], 12)


@torch.no_grad()
def test_padding_is_hidden_from_the_model_and_words_are_not(load):
    adapter, t = load(), torch.tensor([900.0, 300.0])
    cond = adapter.encode_condition(PROMPTS)
    text, mask = cond.tensors["text"], cond.tensors["text_mask"]
    expected = adapter.forward("teacher", noise(), t, cond)
    for hidden, changes in ((mask == 0, False), (mask == 1, True)):
        other = torch.where(hidden[..., None], torch.randn(text.shape), text)
        changed = adapter.forward("teacher", noise(), t, Condition({**cond.tensors, "text": other}))
        assert ((changed - expected).abs().amax(dim=(1, 2, 3, 4)) > 1e-3).tolist() == [changes] * 2


@pytest.mark.parametrize("batched", [True, False])
@torch.no_grad()
def test_guidance_in_training_has_the_norm_of_the_conditional_tokens(load, batched):
    adapter, t = load(evolve(CONFIG, cfg_batched=batched)), torch.tensor([900.0, 300.0])
    cond, negative = adapter.encode_condition(PROMPTS), adapter.encode_neg_condition(NEGATIVE)
    c = adapter.forward("teacher", noise(), t, cond)
    u = adapter.forward("teacher", noise(), t, negative)
    prediction = adapter.forward("teacher", noise(), t, cond, neg_cond=negative, cfg=4.0)
    expected = u + 4 * (c - u)
    for y in range(0, 8, 2):
        for x in range(0, 12, 2):
            token = expected[..., y : y + 2, x : x + 2]
            of_cond = c[..., y : y + 2, x : x + 2].flatten(1).norm(dim=1)
            token *= (of_cond / token.flatten(1).norm(dim=1)).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(prediction, expected)


@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_tokens_are_those_of_the_pipeline(batch, channels, height, width):
    latents = torch.arange(batch * channels * 4 * height * width).float()
    latents = latents.view(batch, channels, 1, 2 * height, 2 * width)
    theirs = QwenImagePipeline._pack_latents(latents, batch, channels, 2 * height, 2 * width)
    assert torch.equal(pack(latents), theirs)
    assert torch.equal(unpack(theirs, latents.shape), latents)
    scaled = rescale_to_norm(theirs + 1, theirs)
    torch.testing.assert_close(scaled.norm(dim=-1), theirs.norm(dim=-1))


def test_a_bf16_role_computes_in_bf16(load):
    t = torch.tensor([900.0, 300.0])
    cond = load().encode_condition(PROMPTS)
    wide, narrow = (
        load(precision=precision).forward("teacher", noise(), t, cond)
        for precision in ("fp32", "bf16")
    )
    assert narrow.dtype == torch.float32
    assert 1e-4 < (wide - narrow).abs().max() < 0.1


def test_a_call_takes_the_planned_bytes(load, qwen_image_folder):
    role = RoleSpec(name="teacher", path=str(qwen_image_folder), trainable=True)
    plan = PLUGIN.plan_call(role, CONFIG, source=role.path, batch=2)
    adapter = load(trainable=True)
    cond = adapter.encode_condition(PROMPTS)
    inputs = {"latents": noise(), "t": torch.tensor([900.0, 300.0]), **cond.tensors}
    measured = measure_call(adapter.models["teacher"], PLUGIN.call_model, inputs)
    assert plan is not None
    assert plan.most == pytest.approx(measured.most, rel=0.02)
    assert plan.held == pytest.approx(measured.held, rel=0.02)


@pytest.mark.parametrize(
    ("file", "entry", "reason"),
    [
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, "QwenImageEditPipeline"),
        ("transformer/config.json", {"zero_cond_t": True}, "zero_cond_t"),
        ("transformer/config.json", {"patch_size": 1}, "patches of 1 x 1"),
        ("transformer/config.json", {"in_channels": 64}, "tokens of 64 channels and gives 16"),
    ],
)
def test_other_models_are_refused_with_the_reason(
    qwen_image_folder: Path, tmp_path, file, entry, reason
):
    folder = shutil.copytree(qwen_image_folder, tmp_path / "other")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | entry))
    role = RoleSpec(name="teacher", path=str(folder), trainable=False)
    (problem,) = PLUGIN.role_problems(role, CONFIG)
    assert reason in problem.message

    with pytest.raises(WeightsError, match=f"{reason}|do not fit"):
        PLUGIN.load([role], CONFIG, device=CPU)
