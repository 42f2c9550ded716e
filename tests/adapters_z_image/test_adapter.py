"""The adapter's pictures are the stock pipeline's, and its conditions are checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from diffusers import ZImagePipeline
from distill_adapters_z_image import PLUGIN, ZImageConfig
from distill_diffusers.planning.calls import measure_call
from distill_protocols import Condition, RoleSpec, SamplerSpec
from family_fixtures import z_image_folder
from torch import Tensor

__all__ = ["z_image_folder"]

torch.set_num_threads(1)

CONFIG = ZImageConfig(height=48, width=64, max_sequence_length=40)
PROMPTS, NEGATIVE = ["a seven moving left " * 6, "a"], "moving"
"""The longer one has more than 32 tokens, and so another padding than the other."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def load(z_image_folder):
    def load(config=CONFIG, **options: Any):
        folder = str(z_image_folder)
        role = RoleSpec(name="teacher", path=folder, **{"trainable": False, **options})
        bundle = PLUGIN.load([role], config, device=CPU)
        return PLUGIN.adapter(bundle, config, source=folder)

    return load


@pytest.fixture(scope="module")
def stock(z_image_folder):
    pipeline = ZImagePipeline.from_pretrained(z_image_folder)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        for parameter in module.parameters():
            # Out of the mapped files, where a product may round otherwise by where numbers lie.
            parameter.data = parameter.data.clone()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(rows: int = 2) -> Tensor:
    return torch.randn(rows, 4, 1, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "guidance",
    [
        {},
        {"guidance_scale": 4.0},
        {"guidance_scale": 4.0, "cfg_normalization": 0.8, "cfg_truncation": 0.6},
    ],
    ids=["plain", "guided", "limited"],
)
def test_sampled_latents_are_the_stock_pipelines(load, stock, guidance):
    """One prompt a call: the pipeline encodes several at once, which rounds otherwise."""
    g = guidance.get("guidance_scale", 0.0)
    limits = {name: value for name, value in guidance.items() if name != "guidance_scale"}
    adapter = load(evolve(CONFIG, **limits))
    encoded = [stock.encode_prompt(p, negative_prompt=NEGATIVE, device=CPU, max_sequence_length=40)
               for p in PROMPTS]  # fmt: skip
    theirs = stock(
        prompt_embeds=[rows[0] for rows, _ in encoded],
        negative_prompt_embeds=[rows[0] for _, rows in encoded],
        latents=noise().squeeze(2), height=48, width=64, num_inference_steps=5,
        output_type="latent", **{"guidance_scale": 0.0, **guidance},
    ).images  # fmt: skip
    spec = SamplerSpec(steps=5, shift=3.0, guidance=g + 1)
    levels = stock.scheduler.sigmas[:-1]
    assert torch.allclose(levels, torch.tensor(spec.sigmas()), rtol=0, atol=2.4e-7)
    spec = evolve(spec, shift=1.0, timesteps=tuple((1000 * levels.double()).tolist()))
    cond, negative = adapter.encode_condition(PROMPTS), adapter.encode_neg_condition(NEGATIVE)
    ours = adapter.sample("teacher", spec, noise(), cond, neg_cond=negative)
    assert torch.equal(ours.squeeze(2), theirs)
    assert theirs.std() > 0.5


def test_decoded_pictures_are_the_stock_pipelines(load, stock):
    theirs = stock(
        prompt="a", latents=noise(1).squeeze(2), height=48, width=64, num_inference_steps=2,
        guidance_scale=0.0, output_type="pt", max_sequence_length=40,
    ).images  # fmt: skip
    times = tuple((1000 * stock.scheduler.sigmas[:-1].double()).tolist())
    spec, adapter = SamplerSpec(steps=2, timesteps=times), load()
    picture = adapter.decode(
        adapter.sample("teacher", spec, noise(1), adapter.encode_condition(["a"]))
    )
    assert torch.equal(picture[:, :, 0], theirs)


def test_a_condition_is_that_of_one_prompt_alone_and_zero_beyond_it(load, stock):
    cond = load().encode_condition(PROMPTS)
    assert cond.tensors["text_mask"].sum(dim=1).tolist() == [32, 9]
    for prompt, row in zip(PROMPTS, cond.tensors["text"], strict=True):
        (theirs,), _ = stock.encode_prompt(prompt, device=CPU, max_sequence_length=40)
        assert torch.equal(row[: len(theirs)], theirs)
        assert not row[len(theirs) :].any()
    counted = PLUGIN.count_tokens(CONFIG, PROMPTS, source=str(stock.name_or_path))
    assert counted is not None
    assert (list(counted.counts), counted.limit) == ([32, 9], 40)


@torch.no_grad()
def test_the_model_reads_the_tokens_of_the_prompt_alone(load):
    adapter, t = load(), torch.tensor([900.0, 300.0])
    cond = adapter.encode_condition(PROMPTS)
    text, mask = cond.tensors["text"], cond.tensors["text_mask"]
    expected = adapter.forward("teacher", noise(), t, cond)
    for hidden, changes in ((mask == 0, False), (mask == 1, True)):
        other = torch.where(hidden[..., None], torch.randn(text.shape), text)
        changed = adapter.forward("teacher", noise(), t, Condition({**cond.tensors, "text": other}))
        assert ((changed - expected).abs().amax(dim=(1, 2, 3, 4)) > 1e-4).tolist() == [changes] * 2


@torch.no_grad()
def test_guidance_in_training_is_cut_off_row_by_row(load):
    adapter, t = load(evolve(CONFIG, cfg_truncation=0.5)), torch.tensor([900.0, 300.0])
    cond, negative = adapter.encode_condition(PROMPTS), adapter.encode_neg_condition(NEGATIVE)
    c = adapter.forward("teacher", noise(), t, cond)
    u = adapter.forward("teacher", noise(), t, negative)
    prediction = adapter.forward("teacher", noise(), t, cond, neg_cond=negative, cfg=3.0)
    expected = torch.stack([u[0] + 3 * (c[0] - u[0]), c[1]])
    torch.testing.assert_close(prediction, expected, rtol=1e-4, atol=1e-5)


def test_a_call_of_the_longest_texts_takes_the_planned_bytes(load, z_image_folder):
    config = evolve(CONFIG, max_sequence_length=32)
    role = RoleSpec(name="teacher", path=str(z_image_folder), trainable=True)
    plan = PLUGIN.plan_call(role, config, source=role.path, batch=2)
    adapter = load(config, trainable=True)
    cond = adapter.encode_condition([PROMPTS[0]] * 2)
    inputs = {"latents": noise(), "t": torch.tensor([900.0, 300.0]), **cond.tensors}
    measured = measure_call(adapter.models["teacher"], PLUGIN.call_model, inputs)
    assert plan is not None
    assert plan.most == pytest.approx(measured.most, rel=0.02)
    assert plan.held == pytest.approx(measured.held, rel=0.02)


@pytest.mark.parametrize(
    ("file", "entry", "reason"),
    [
        ("model_index.json", {"_class_name": "ZImageOmniPipeline"}, "ZImageOmniPipeline"),
        ("transformer/config.json", {"siglip_feat_dim": 8}, "reads pictures"),
        ("transformer/config.json", {"all_patch_size": [1]}, "patches of"),
        ("transformer/config.json", {"in_channels": 8}, "latents of 4 channels"),
    ],
)
def test_other_models_are_refused_with_the_reason(
    z_image_folder: Path, tmp_path, file, entry, reason
):
    folder = shutil.copytree(z_image_folder, tmp_path / "other")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | entry))
    role = RoleSpec(name="teacher", path=str(folder), trainable=False)
    (problem,) = PLUGIN.role_problems(role, CONFIG)
    assert reason in problem.message


def test_the_published_model_has_its_parameters():
    config = ZImageConfig(height=1024, width=1024)
    role = RoleSpec(name="student", path="Tongyi-MAI/Z-Image", trainable=True)
    plan = PLUGIN.plan(role, config)
    assert plan.parameters == count_parameters(width=3840, layers=30, refiners=2, text=2560)
    assert plan.parameters == 6_154_908_736  # what the hub calls 6B
    assert PLUGIN.latent_tokens(config, source=role.path) == 4096


def count_parameters(width, layers, refiners, text):
    """Count weights and biases: attention without biases, gated MLPs of 8/3 widths, 256 channels of
    time."""
    attention = 4 * width**2 + 2 * 128  # q, k, v, out; two norms of a head's width
    plain = attention + 3 * width * int(width / 3 * 8) + 4 * width
    modulation = 256 * 4 * width + 4 * width
    time = (256 * 1024 + 1024) + (1024 * 256 + 256)
    captions = text + text * width + width
    ends = (64 * width + width) + (width * 64 + 64) + (256 * width + width) + 2 * width
    return (layers + refiners) * (plain + modulation) + refiners * plain + time + captions + ends
