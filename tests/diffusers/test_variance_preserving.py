"""A tiny model like SDXL's, of another noise schedule and prediction, behind the flow contract."""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import distill_runtime.plugins
import pytest
import torch
import unet_family
import yaml
from app_ranks import read_losses
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from distill_conditioning import ShardWriter, preprocess
from distill_diffusers.calls.flow import add_noise
from distill_diffusers.config import ImageConfig
from distill_diffusers.noise_levels import NoiseLevels
from distill_diffusers.variance_preserving import level_of, to_model, to_velocity
from distill_protocols import (
    ConfigError,
    ContractError,
    ModelBundle,
    RoleSpec,
    SamplerSpec,
    WeightsError,
)
from distill_runfile.read import read_config
from distill_train.build import Run, build
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import one_process
from torch import Tensor
from unet_family import PLUGIN

torch.set_num_threads(1)

CONFIG = ImageConfig(height=32, width=48)
SDXL = NoiseLevels.of_scheduler(unet_family.SCHEDULER)
PROMPT, NEGATIVE = "a seven moving left", "moving"
FEW = [935.8, 800.0]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    base, built = tmp_path_factory.mktemp("unet"), {}

    def folder(prediction: str = "epsilon") -> Path:
        if prediction not in built:
            built[prediction] = unet_family.build(base / prediction, prediction)
        return built[prediction]

    return folder


def noise(rows: int = 2) -> Tensor:
    return torch.randn(rows, 4, 1, 4, 6, generator=torch.Generator().manual_seed(0))


# -- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_levels_are_those_of_the_scheduler(schedule):
    config = unet_family.SCHEDULER | {"beta_schedule": schedule, "num_train_timesteps": 200}
    kept = DDPMScheduler(**config).alphas_cumprod.double()
    ratios = torch.tensor(NoiseLevels.of_scheduler(config).log_ratios, dtype=torch.float64)
    torch.testing.assert_close(ratios, 0.5 * torch.log((1 - kept) / kept), rtol=0, atol=1e-4)


def test_sdxls_times_end_at_936():
    assert SDXL.time_range == (0.0, 936.0)
    assert SDXL.flow_time(999) == pytest.approx(935.9, abs=0.1)
    assert SDXL.flow_time(0) == pytest.approx(28.4, abs=0.1)


@pytest.mark.parametrize(
    "entry",
    [
        {"rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "sample"},
        {"num_train_timesteps": 1},
        {"beta_end": 1.0},
    ],
)
def test_a_schedule_that_is_not_known_is_refused(entry):
    with pytest.raises(WeightsError, match=r"known here are|not supported"):
        NoiseLevels.of_scheduler(unet_family.SCHEDULER | entry)


@given(st.floats(0, 998.99), st.sampled_from(["epsilon", "v_prediction"]), st.integers(0, 9))
def test_a_model_without_error_gives_v_of_flow_matching(n, kind, seed):
    t = torch.tensor([SDXL.flow_time(n)], dtype=torch.float64)
    assert float(level_of(t, SDXL)) == pytest.approx(n, abs=1e-3)
    x0, eps = torch.randn(2, 1, 4, 1, 2, 2, generator=torch.Generator().manual_seed(seed)).double()
    x_t, ratio = add_noise(x0, eps, t), float(t / (1000 - t))
    a = 1 / math.sqrt(1 + ratio**2)
    b = ratio * a
    torch.testing.assert_close(to_model(x_t, t), a * x0 + b * eps)
    exact = eps if kind == "epsilon" else a * eps - b * x0
    torch.testing.assert_close(to_velocity(exact, x_t, t, kind), eps - x0)


def test_beyond_the_first_and_the_last_level_it_is_theirs():
    assert level_of(torch.tensor([0.0, 20.0, 935.99]), SDXL).tolist() == [0.0, 0.0, 999.0]


# -- against the stock pipeline ------------------------------------------------------------------


def load(folder: Path):
    role = RoleSpec(name="teacher", path=str(folder), trainable=False)
    bundle = PLUGIN.load([role], CONFIG, device=torch.device("cpu"))
    return PLUGIN.adapter(bundle, CONFIG, source=str(folder))


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_eulers_method_samples_as_the_stock_pipeline_with_ddim(folder_of, prediction, guidance):
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder_of(prediction))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=[PROMPT, "a"], negative_prompt=[NEGATIVE] * 2, latents=noise().squeeze(2),
        height=32, width=48, num_inference_steps=4, guidance_scale=guidance, output_type="latent",
    ).images  # fmt: skip
    levels = pipeline.scheduler.timesteps.tolist()
    assert levels == [750, 500, 250, 0]
    spec = SamplerSpec(
        steps=4, timesteps=tuple(SDXL.flow_time(n) for n in levels), guidance=guidance
    )
    adapter = load(folder_of(prediction))
    cond = adapter.encode_condition([PROMPT, "a"])
    negative = adapter.encode_neg_condition(NEGATIVE)
    ours = adapter.sample("teacher", spec, noise(), cond, neg_cond=negative)
    torch.testing.assert_close(ours.squeeze(2), theirs, rtol=0, atol=1e-4)
    assert theirs.std() > 0.5


def test_a_time_that_the_model_does_not_know_is_refused(folder_of):
    adapter = load(folder_of())
    cond = adapter.encode_condition([PROMPT, "a"])
    with pytest.raises(ContractError, match="knows t from 0 to 936, where its noise levels end"):
        adapter.forward("teacher", noise(), torch.tensor([500.0, 940.0]), cond)


# -- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_of(folder_of, tmp_path_factory):
    """Return ``run(method, sampler)``: a run file of that method, read and built, not yet run."""
    data = tmp_path_factory.mktemp("unet-data") / "data"
    adapter = PLUGIN.adapter(ModelBundle({}), CONFIG, source=str(folder_of()))
    generator = torch.Generator().manual_seed(0)
    pictures = ((f"{i}", PROMPT, torch.rand(3, 1, 32, 48, generator=generator)) for i in range(4))
    with ShardWriter(data) as writer:
        preprocess(pictures, adapter, writer, negative_prompt=NEGATIVE)

    def run(folder: Path, method: str, sampler: dict[str, Any], **options: Any) -> Run:
        roles = ("student",) if method == "finetune" else ("student", "teacher", "critic")
        values = {
            "recipe": {"family": "unet", "method": method},
            "models": {name: {"path": str(folder_of())} for name in roles},
            "training": {
                "output_dir": str(folder / "out"), "max_train_steps": 4, "progress": False,
                "global_batch_size": 2, "log_every": 1, "trackers": ["jsonl"],
                "optimizer": {"lr": 1e-3},
            },
            "data": {"path": str(data)},
            "pipeline_config": {"height": 32, "width": 48},
            "method_config": {"student_sampler": sampler, **options},
            "validation": {
                "prompts": [PROMPT, "a"], "every_steps": 4,
                "views": {"student": {"role": "student"}},
            },
        }  # fmt: skip
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return build(read_config(file), distribution=one_process())

    return run


@pytest.fixture
def installed(monkeypatch):
    """Let run files find the family, as if its package was installed."""
    real = distill_runtime.plugins.entry_points

    def entry_points(*, group: str):
        own = [EntryPoint("unet", "unet_family:PLUGIN", group)] * (group == "distill.families")
        return (*real(group=group), *own)

    monkeypatch.setattr(distill_runtime.plugins, "entry_points", entry_points)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("finetune", {"time": {"shift": 5.0}}),
        ("dmd2", {"generator_update_interval": 2, "real_score_guidance_scale": 2.0}),
    ],
)
def test_a_method_trains_the_model_within_its_times(
    installed, run_of, tmp_path, monkeypatch, method, options
):
    run = run_of(tmp_path, method, {"steps": 2, "timesteps": FEW}, **options)
    levels: list[float] = []
    call = PLUGIN.call_model

    def record(role: Any, inputs: Any) -> Tensor:
        levels.extend(inputs["t"].tolist())
        return call(role, inputs)

    monkeypatch.setattr(type(PLUGIN), "call_model", lambda _, *args: record(*args))
    run.trainer.run(run.method, run.loader)
    losses = read_losses(tmp_path / "out")
    assert list(losses) == [1, 2, 3, 4]
    assert all(math.isfinite(value) for numbers in losses.values() for value in numbers.values())
    assert min(levels) >= 0
    assert 900 < max(levels) <= 999
    folder = tmp_path / "out" / "validation" / "iteration-000004" / "student"
    assert {file.name for file in folder.glob("*.png")} >= {"000.png", "001.png"}


def test_a_sampler_that_begins_at_pure_noise_is_a_problem_with_the_way_out(
    installed, run_of, tmp_path
):
    with pytest.raises(ConfigError) as excinfo:
        run_of(tmp_path, "dmd2", {"steps": 2, "shift": 3.0})
    problems = "\n".join(excinfo.value.problems)
    assert "'student' has a model that knows no other times, called at t from 0 to 936" in problems
    assert "its rollouts call it at t = 1000 too. Write timesteps within these" in problems
