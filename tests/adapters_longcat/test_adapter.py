"""The adapter samples as the original does: from text."""

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
from distill_diffusers.sampling.scheduler import stock_schedule
from distill_protocols import (
    Condition,
    ConditioningError,
    DynamicShift,
    RoleSpec,
    SamplerSpec,
    WeightsError,
)
from longcat_inputs import LENGTH, latents, negative, normal, text
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


def condition() -> Condition:
    embeds, mask = text()
    return Condition({"text": embeds, "text_mask": mask})


def negative_row() -> Condition:
    embeds, mask = negative(1)
    return Condition({"text": embeds, "text_mask": mask})


def original_spec(steps: int, guidance: float) -> SamplerSpec:
    times = tuple((1000 * torch.linspace(1, 0.001, steps).double()).tolist())
    return SamplerSpec(steps=steps, timesteps=times, guidance=guidance)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("zero_pad", [True, False])
def test_sampled_latents_are_the_originals(load, zero_pad, guidance):
    adapter = load(zero_pad)
    clean = adapter.sample(
        "teacher", original_spec(4, guidance), latents(), condition(),
        neg_cond=negative_row(),
    )  # fmt: skip
    recorded = RECORDED[f"{zero_pad}.sample.{guidance:g}.0"]
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


def test_prompts_of_another_length_are_refused(load):
    adapter = load()
    cond = adapter.encode_condition(["a seven"])
    short = Condition({name: tensor[:, :4] for name, tensor in cond.tensors.items()})
    with pytest.raises(ConditioningError, match="the model takes"):
        adapter.forward("teacher", latents(1), torch.tensor([500.0]), short)
