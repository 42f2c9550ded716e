"""Families beside Wan, trained, stopped, resumed and exported by methods of every kind."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from app_ranks import read_losses
from attrs import evolve, frozen
from diffusers import LTXPipeline, StableDiffusion3Pipeline
from distill_adapters_ltx import PLUGIN as LTX
from distill_conditioning import ShardWriter, preprocess
from distill_diffusers.calls.tokens import pack, unpack
from distill_protocols import FamilyPlugin, ModelBundle, SamplerSpec
from distill_runfile.read import read_config
from distill_train.build import Run, build
from family_fixtures import installed, ltx_folder, sd3, sd3_folder
from safetensors.torch import load_file
from tiny_run import one_process
from torch import Tensor

__all__ = ["installed", "ltx_folder", "sd3", "sd3_folder"]

PROMPT, NEGATIVE = "a seven moving left", "moving"
GUIDED = {"steps": 4, "shift": 3.0, "guidance": 3.0}
FEW = {"steps": 2, "timesteps": [1000, 700]}
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "finetune": (("student",), {"student_sampler": GUIDED}),
    "teacher_only": (("student", "teacher"), {"guidance_scale": 2.0, "student_sampler": FEW}),
    "dmd2": (
        ("student", "teacher", "critic"),
        {
            "generator_update_interval": 2,
            "real_score_guidance_scale": 2.0,
            "student_sampler": FEW,
        },
    ),
    "consistency": (
        ("student", "teacher"),
        {"guidance_scale": 2.0, "discrete": {"steps": 8, "skip": 2}, "student_sampler": FEW},
    ),
}
"""By method: its roles, and its ``method_config``."""


@frozen(kw_only=True)
class Family:
    """A tiny model of a family, its data, and the stock pipeline that reads its exports.

    Attributes:
        pipeline_config: keys of that section.
        to_stock: latents [B, C, T, H, W] as the pipeline takes and gives them.
        from_stock: back again.
    """

    plugin: FamilyPlugin[Any]
    pipeline_config: Mapping[str, Any]
    path: Path
    data: Path
    pipeline: Any
    to_stock: Callable[[Tensor], Tensor]
    from_stock: Callable[[Tensor], Tensor]

    def write(self, folder: Path, method: str, *, steps: int = 4, **sampler: Any) -> Path:
        """Write a run file; ``sampler`` is laid over the student's."""
        roles, options = METHODS[method]
        options = {**options, "student_sampler": options["student_sampler"] | sampler}
        values = {
            "recipe": {"family": self.plugin.name, "method": method},
            "models": {name: {"path": str(self.path)} for name in roles},
            "training": {
                "output_dir": str(folder / "out"), "max_train_steps": steps, "progress": False,
                "global_batch_size": 2, "log_every": 1, "trackers": ["jsonl"],
                "optimizer": {"lr": 1e-3},
            },
            "data": {"path": str(self.data)},
            "pipeline_config": dict(self.pipeline_config),
            "method_config": options,
            "checkpoint": {
                "every_steps": 2, "resume": "latest",
                "export": [{"role": "student", "folder": "student", "verify": True}],
            },
            "callbacks": {"grad_clip": {}, "ema": {"roles": ["student"], "decay": 0.5}},
        }  # fmt: skip
        file = folder / "run.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file

    def sample_exported(self, run: Run, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
        """Sample with the stock pipeline of an export, and with the trainer's adapter at the noise
        levels of the pipeline's scheduler and at those of the sampler."""
        record = json.loads((folder / "sampler_spec.json").read_text())
        pipeline = self.pipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
            for parameter in module.parameters():
                # Out of the mapped files, where a product may round otherwise by where numbers lie.
                parameter.data = parameter.data.clone()
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(1, *run.adapter.latent_shape, generator=generator)
        (theirs,) = pipeline(
            prompt=PROMPT, negative_prompt=NEGATIVE, output_type="latent", return_dict=False,
            latents=self.to_stock(noise).contiguous(), **record["call"],
        )  # fmt: skip
        cond = run.adapter.encode_condition([PROMPT])
        negative = run.adapter.encode_condition([NEGATIVE])
        timesteps = record["sampler"]["timesteps"]
        spec = SamplerSpec(
            **{**record["sampler"], "timesteps": timesteps and tuple(map(float, timesteps))}
        )
        levels = tuple((1000 * pipeline.scheduler.sigmas[:-1].double()).tolist())
        exact = evolve(spec, shift=1.0, timesteps=levels)
        at_levels, at_spec = (
            run.adapter.sample("student", s, noise, cond, neg_cond=negative) for s in (exact, spec)
        )
        return self.from_stock(theirs), at_levels, at_spec


@pytest.fixture(scope="module")
def ltx(ltx_folder, tmp_path_factory) -> Family:
    config = {
        "num_frames": 17, "height": 64, "width": 96, "frame_rate": 24, "max_sequence_length": 8,
    }  # fmt: skip
    return Family(
        plugin=LTX,
        pipeline_config=config,
        path=ltx_folder("0.9.1"),
        data=encode_clips(tmp_path_factory, LTX, config, ltx_folder("0.9.1")),
        pipeline=LTXPipeline,
        to_stock=pack,
        from_stock=lambda latents: unpack(latents, (3, 2, 3)),
    )


@pytest.fixture(scope="module")
def sd3_family(sd3, sd3_folder, tmp_path_factory) -> Family:
    config = {"height": 32, "width": 48, "max_sequence_length": 8}
    plugin = sd3.plugin.PLUGIN
    return Family(
        plugin=plugin,
        pipeline_config=config,
        path=sd3_folder(),
        data=encode_clips(tmp_path_factory, plugin, config, sd3_folder()),
        pipeline=StableDiffusion3Pipeline,
        to_stock=lambda latents: latents.squeeze(2),
        from_stock=lambda latents: latents.unsqueeze(2),
    )


@pytest.fixture(params=["ltx", "sd3_family"])
def family(request) -> Family:
    return request.getfixturevalue(request.param)


def encode_clips(
    tmp_path_factory: Any, plugin: FamilyPlugin[Any], config: Mapping[str, Any], path: Path
) -> Path:
    """Write a data set of four clips, encoded by an adapter without roles."""
    folder = tmp_path_factory.mktemp(plugin.name) / "data"
    section = plugin.config_class(**config)
    adapter = plugin.adapter(ModelBundle({}), section, source=str(path))
    size = (section.num_frames, section.height, section.width)
    generator = torch.Generator().manual_seed(0)
    clips = ((f"{i}", PROMPT, torch.rand(3, *size, generator=generator)) for i in range(4))
    with ShardWriter(folder) as writer:
        preprocess(clips, adapter, writer, negative_prompt=NEGATIVE)
    return folder


def train(file: Path) -> Run:
    run = build(read_config(file), distribution=one_process())
    run.trainer.run(run.method, run.loader)
    run.method.set_trainable("student", False)
    return run


def stored(checkpoint: Path) -> dict[str, Tensor]:
    return {
        f"{file.relative_to(checkpoint)}/{name}": value
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_as_one_that_never_stopped_and_stock_code_samples_its_student(
    family, method, tmp_path
):
    """The checkpoint of iteration 4 is deleted, and the file run again: from iteration 2."""
    file, out = family.write(tmp_path, method), tmp_path / "out"
    train(file)
    middle, last = out / "checkpoint-000002", out / "checkpoint-000004"
    expected, numbers = stored(last), read_losses(out)
    assert list(numbers) == [1, 2, 3, 4]
    assert any("ema" in name for name in expected)
    assert any("optim" in name for name in expected)
    written = (middle / "manifest.json").stat().st_mtime_ns
    shutil.rmtree(last)
    shutil.rmtree(out / "student")
    run = train(file)
    assert (middle / "manifest.json").stat().st_mtime_ns == written  # it went on from there
    resumed, before = stored(last), stored(middle)
    assert resumed.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(resumed[name], expected[name])] == []
    assert read_losses(out) == numbers
    assert any(not torch.equal(before[name], value) for name, value in expected.items())

    theirs, at_levels, at_spec = family.sample_exported(run, out / "student")
    assert torch.equal(theirs, at_levels)
    # The scheduler's grid is rounded to fp32 before it is shifted.
    torch.testing.assert_close(theirs, at_spec, rtol=0, atol=1e-5)
    assert theirs.std() > 0.1


def test_a_shift_that_is_a_rule_reaches_the_stock_pipeline(ltx, tmp_path):
    """mu is linear in the tokens of a clip, the shift e^mu, and the last level is stretched."""
    rule = {"base_tokens": 10, "base_mu": 0.5, "max_tokens": 30, "max_mu": 1.5, "terminal": 0.1}
    run = train(ltx.write(tmp_path, "finetune", steps=1, shift=rule))
    shift = math.exp(0.5 + (18 - 10) / (30 - 10) * (1.5 - 0.5))  # of 3 x 2 x 3 tokens
    free = [1 - shift * u / (1 + (shift - 1) * u) for u in (1, 0.75, 0.5, 0.25)]
    levels = [1000 * (1 - x * (1 - 0.1) / free[-1]) for x in free]
    record = json.loads((tmp_path / "out" / "student" / "sampler_spec.json").read_text())
    assert record["timesteps"] == pytest.approx(levels, abs=1e-3)
    assert record["stock_timesteps"] == pytest.approx(levels, abs=1e-3)
    theirs, at_levels, at_spec = ltx.sample_exported(run, tmp_path / "out" / "student")
    assert torch.equal(theirs, at_levels)
    torch.testing.assert_close(theirs, at_spec, rtol=0, atol=1e-5)
