"""The adapter samples as the original does: from text, a first frame, or going on from several."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import longcat_pipelines
import pytest
import torch
from distill_adapters_longcat import PLUGIN, LongCatPipelineConfig
from distill_adapters_longcat.adapter import scale_to
from distill_adapters_longcat.export import LongCatGrid
from distill_conformance.adapter_case import counted_calls
from distill_diffusers.sampling.scheduler import stock_schedule
from distill_protocols import (
    Condition,
    ConditioningError,
    DynamicShift,
    GivenFrames,
    RoleSpec,
    SamplerSpec,
    WeightsError,
)
from longcat_inputs import LENGTH, given, latents, negative, normal, text
from safetensors.torch import load_file

RECORDED = load_file(Path(__file__).parent / "original.safetensors")
ATOL = 5e-5
"""Four steps in fp32, and guidance of 4."""
CPU = torch.device("cpu")
CONFIG = LongCatPipelineConfig(num_frames=9, height=32, width=48, max_sequence_length=LENGTH)


@pytest.fixture(scope="module")
def load(longcat_folder, tmp_path_factory):
    made = {True: longcat_folder}

    def load(zero_pad: bool = True, config=CONFIG):
        if zero_pad not in made:
            folder = tmp_path_factory.mktemp("longcat") / "dropped"
            made[zero_pad] = longcat_pipelines.build(folder, zero_pad=zero_pad)
        folder = str(made[zero_pad])
        role = RoleSpec(name="teacher", path=folder, trainable=False)
        bundle = PLUGIN.load([role], config, device=CPU)
        return PLUGIN.adapter(bundle, config, source=folder)

    return load


def condition(count: int, rows: int) -> Condition:
    embeds, mask = text(rows)
    frames = {"image_latents": given(count, rows)} if count else {}
    return Condition({"text": embeds, "text_mask": mask, **frames})


def negative_row() -> Condition:
    embeds, mask = negative(1)
    return Condition({"text": embeds, "text_mask": mask})


def original_spec(steps: int, guidance: float) -> SamplerSpec:
    times = tuple((1000 * torch.linspace(1, 0.001, steps).double()).tolist())
    return SamplerSpec(steps=steps, timesteps=times, guidance=guidance)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("count", [0, 1, 2], ids=["text", "first-frame", "continuation"])
@pytest.mark.parametrize("zero_pad", [True, False])
def test_sampled_latents_are_the_originals(load, zero_pad, count, guidance):
    adapter, rows = load(zero_pad), 2 if count == 0 else 1
    clean = adapter.sample(
        "teacher", original_spec(4, guidance), latents(rows), condition(count, rows),
        neg_cond=negative_row(),
    )  # fmt: skip
    recorded = RECORDED[f"{zero_pad}.sample.{guidance:g}.{count}"]
    torch.testing.assert_close(clean, recorded, rtol=0, atol=ATOL)
    assert recorded.std() > 0.1


def test_cfg_zero_leaves_what_is_orthogonal_to_the_unconditional():
    """s u is the projection of c on u, so that c - s u is orthogonal to u; a row at a time."""
    u, c = normal(3, 4, 2, 3, 3, seed=1), normal(3, 4, 2, 3, 3, seed=2)
    scaled = scale_to(u, c)
    residual = ((c - scaled) * u).sum(dim=(1, 2, 3, 4))
    torch.testing.assert_close(residual, torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(scale_to(7 * u, c), scaled)  # of u the direction alone matters
    torch.testing.assert_close(scale_to(u[1:2], c[1:2]), scaled[1:2])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_several_given_frames_are_read_once(load, guidance):
    adapter = load()
    with counted_calls(adapter.models["teacher"]) as calls:
        adapter.sample(
            "teacher", original_spec(4, guidance), latents(1), condition(2, 1),
            neg_cond=negative_row(),
        )  # fmt: skip
    assert len(calls) == 5


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@torch.no_grad()
def test_training_and_sampling_predict_alike_on_given_frames(load, guidance):
    """Training calls whole clips, sampling the frames behind a cache; the scale of CFG-zero is that
    of the frames that are predicted in both."""
    adapter, cond = load(), condition(2, 1)
    x0 = adapter.forward(
        "teacher", latents(1), torch.tensor([700.0]), cond,
        fwd_pred_type="x0", cfg=guidance, neg_cond=negative_row(),
    )  # fmt: skip
    assert torch.equal(x0[:, :, :2], given(2, 1))
    step = SamplerSpec(steps=1, timesteps=(700.0,), guidance=guidance)
    sampled = adapter.sample("teacher", step, latents(1), cond, neg_cond=negative_row())
    torch.testing.assert_close(sampled, x0, rtol=0, atol=ATOL)
    mask = adapter.trained_frames(cond)
    assert mask.flatten().tolist() == [0, 0, 1]
    assert adapter.trained_frames(condition(0, 1)) is None


def test_a_rollout_from_given_frames_is_the_sample_and_trains_through_them(load, longcat_folder):
    role = RoleSpec(name="student", path=str(longcat_folder), trainable=True)
    bundle = PLUGIN.load([role], CONFIG, device=CPU)
    adapter = PLUGIN.adapter(bundle, CONFIG, source=str(longcat_folder))
    spec, cond = original_spec(3, 1.0), condition(2, 1)
    rollout = adapter.rollout("student", spec, latents(1), cond, exit_steps=[2])
    sampled = adapter.sample("student", spec, latents(1), cond)
    assert torch.equal(rollout.detach(), sampled)
    rollout.square().mean().backward()
    weights = bundle["student"].modules["dit"]
    # Keys of given frames come through the first block alone where there are two.
    gradient = weights.get_parameter("blocks.0.attn.qkv.weight").grad
    assert gradient is not None
    assert gradient.abs().max() > 0


@torch.no_grad()
def test_frames_are_given_as_pixels(load):
    adapter = load()
    cond = adapter.encode_condition(["a seven moving"])
    video = normal(1, 3, 5, 32, 48, seed=6).sigmoid()
    several = adapter.with_image(cond, video)
    first = adapter.with_image(cond, video[:, :, 0])
    assert several.tensors["image_latents"].shape == (1, 4, 2, 4, 6)
    # The VAE is causal: the first latent frame knows no later ones.
    torch.testing.assert_close(
        several.tensors["image_latents"][:, :, :1], first.tensors["image_latents"]
    )
    raw = adapter.encode(torch.cat([video, video[:, :, :4]], dim=2))
    torch.testing.assert_close(
        adapter.normalize_latents(raw)[:, :, :2], several.tensors["image_latents"],
        rtol=0, atol=1e-5,
    )  # fmt: skip
    with pytest.raises(ConditioningError, match="4k \\+ 1"):
        adapter.with_image(cond, video[:, :, :4])
    role = RoleSpec(name="teacher", path="meituan-longcat/LongCat-Video", trainable=False)
    conditions = PLUGIN.frame_conditions(role, CONFIG)
    assert conditions.problem(GivenFrames(first=13), 93) is None
    assert conditions.problem(GivenFrames(first=1, last=True), 93) is not None


@pytest.mark.parametrize("steps", [12, 16, 50])
def test_a_dynamic_shift_has_the_originals_noise_levels(steps):
    """linspace(1, 0.001, N) shifted by 12: the README's formula, as the run files have it."""
    grid = torch.linspace(1, 0.001, steps, dtype=torch.float64)
    levels = 12 * grid / (1 + 11 * grid)
    shift = 1 / (1 - 11 / 12 * 0.999 * steps / (steps - 1))
    mu = float(torch.tensor(shift, dtype=torch.float64).log())
    rule = DynamicShift(base_mu=mu, max_mu=mu, terminal=float(levels[-1]))
    spec = SamplerSpec(steps=steps, shift=rule).resolved(1)
    assert spec.sigmas() == pytest.approx(levels.tolist(), abs=1e-9)
    schedule = stock_schedule(spec, LongCatGrid())
    assert schedule.config["shift"] == pytest.approx(12, rel=1e-3)
    assert schedule.deviation < 1e-3


def test_models_that_would_be_called_wrongly_are_refused(longcat_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(longcat_folder, folder)
    file = folder / "dit" / "config.json"
    config = json.loads(file.read_text())
    role = RoleSpec(name="teacher", path=str(folder), trainable=False)
    assert list(PLUGIN.role_problems(role, CONFIG)) == []
    for change, word in (
        ({"enable_bsa": True}, "block-sparse"),
        ({"_class_name": "LongCatVideoAvatarTransformer3DModel"}, "avatars"),
        ({"patch_size": [2, 2, 2]}, "of one frame"),
        ({"num_heads": 4}, "multiple of 8"),
        ({"in_channels": 8}, "latent channels"),
    ):
        file.write_text(json.dumps(config | change))
        (problem,) = PLUGIN.role_problems(role, CONFIG)
        assert word in problem.message
    file.unlink()
    assert any("config.json is missing" in p.message for p in PLUGIN.role_problems(role, CONFIG))
    with pytest.raises(WeightsError):
        PLUGIN.load([role], CONFIG, device=CPU)


@pytest.mark.parametrize("trainable", [False, True], ids=["stored", "autocast"])
def test_a_bf16_role_computes_in_bf16(longcat_folder, trainable):
    """Modulation and the last layer stay in fp32, whichever way the rest gets to 16 bits."""
    path = str(longcat_folder)
    wide = RoleSpec(name="wide", path=path, trainable=False)
    narrow = RoleSpec(name="narrow", path=path, trainable=trainable, precision="bf16")
    bundle = PLUGIN.load([wide, narrow], CONFIG, device=CPU)
    adapter = PLUGIN.adapter(bundle, CONFIG, source=path)
    t, cond = torch.tensor([833.33, 211.7]), condition(0, 2)
    with torch.no_grad():
        a, b = (adapter.forward(role, latents(), t, cond) for role in ("wide", "narrow"))
    assert b.dtype == torch.float32
    assert 1e-4 < (a - b).abs().max() < 0.2
    if trainable:
        adapter.forward("narrow", latents(), t, condition(2, 2)).square().mean().backward()
        gradients = [p.grad for p in bundle["narrow"].modules["dit"].parameters()]
        assert all(g is not None and g.dtype == torch.float32 for g in gradients)


def test_prompts_of_another_length_are_refused(load):
    adapter = load()
    cond = adapter.encode_condition(["a seven"])
    short = Condition({name: tensor[:, :4] for name, tensor in cond.tensors.items()})
    with pytest.raises(ConditioningError, match="the model takes"):
        adapter.forward("teacher", latents(1), torch.tensor([500.0]), short)
