"""The app trains tiny LTX pipelines by every kind of method, and stock code samples what it gives.

The folder is that of 0.9.1 but where a test states otherwise: its decoder reads a time and noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from app_ranks import assert_weights_alike, largest_difference, read_losses, read_weights
from app_ranks import train as train_rank
from attrs import evolve
from diffusers import LTXPipeline
from distill_adapters_ltx import PLUGIN, LTXPipelineConfig
from distill_conditioning import ShardWriter, preprocess
from distill_diffusers.calls.tokens import pack, unpack
from distill_media import read_mp4, write_mp4
from distill_protocols import ConfigError, ModelBundle, RowGenerators, SamplerSpec
from distill_runfile.cli import EXIT_INCOMPLETE
from distill_runfile.read import read_config
from distill_train.build import Run, build
from distill_train.cli import main
from distill_train.run import run as run_app
from PIL import Image
from ranks import run_on_ranks
from safetensors.torch import load_file
from slow_cases import slow_but
from tiny_run import one_process
from torch import Tensor

CLIP = {
    "num_frames": 17, "height": 64, "width": 96, "frame_rate": 24, "max_sequence_length": 8,
}  # fmt: skip
SIZE = (3, 2, 3)
PROMPT, NEGATIVE = "a seven moving left", "moving"
ODE = {"steps": 4, "shift": 3.0}
GUIDED = {**ODE, "guidance": 3.0}
STOCHASTIC = {"steps": 2, "timesteps": [1000, 700], "stochastic": True}
MATCHING = {"generator_update_interval": 2, "real_score_guidance_scale": 2.0}
METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "finetune": (("student",), {"student_sampler": GUIDED}),
    "dmd2": (("student", "teacher", "critic"), {**MATCHING, "student_sampler": STOCHASTIC}),
    "ladd": (
        ("student", "teacher", "discriminator"),
        {"generator_update_interval": 2, "student_sampler": {"steps": 1}},
    ),
    "rcm": (
        ("student", "teacher", "critic"),
        {**MATCHING, "continuous": {"tangent_warmup": 2}, "student_sampler": STOCHASTIC},
    ),
}
"""Name -> (roles, method_config)."""


@pytest.fixture(scope="module")
def data(folder_of, tmp_path_factory) -> Path:
    """Encode a data set of six clips as an adapter without roles does."""
    folder = tmp_path_factory.mktemp("clips") / "data"
    source = str(folder_of("0.9.1"))
    adapter = PLUGIN.adapter(ModelBundle({}), LTXPipelineConfig(**CLIP), source=source)
    generator = torch.Generator().manual_seed(0)
    clips = (
        (f"clip-{i}", PROMPT, torch.rand(3, 17, 64, 96, generator=generator)) for i in range(6)
    )
    with ShardWriter(folder) as writer:
        preprocess(clips, adapter, writer, negative_prompt=NEGATIVE)
    return folder


@pytest.fixture
def run_file(folder_of, data, tmp_path):
    """Return ``run_file(method, steps, out=..., **sections)``, which writes a run file."""

    def write(method: str, steps: int = 4, *, out: str = "out", **sections: Any) -> Path:
        roles, options = METHODS[method]
        models: dict[str, Any] = {name: {"path": str(folder_of("0.9.1"))} for name in roles}
        if "discriminator" in models:
            models["discriminator"] = {"heads": {"on": "teacher", "blocks": [0, 1], "width": 8}}
        for name, keys in sections.pop("models", {}).items():
            models[name] |= keys
        values = {
            "recipe": {"family": "ltx", "method": method},
            "models": models,
            "training": {
                "output_dir": str(tmp_path / out), "max_train_steps": steps, "progress": False,
                "global_batch_size": 2, "log_every": 1, "trackers": ["jsonl"],
                "optimizer": {"lr": 1e-3}, **sections.pop("training", {}),
            },
            "data": {"path": str(data)},
            "pipeline_config": CLIP,
            "method_config": options,
            "checkpoint": {
                "resume": "latest",
                "export": [{"role": "student", "folder": "student", "verify": True}],
            },
            "callbacks": {"grad_clip": {}},
            **sections,
        }  # fmt: skip
        file = tmp_path / f"{out}.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file

    return write


def train(file: Path) -> Run:
    run = build(read_config(file), distribution=one_process())
    run.trainer.run(run.method, run.loader)
    return run


def exported(folder: Path) -> tuple[Mapping[str, Any], Any]:
    """Return the record of an export and its stock pipeline."""
    record = json.loads((folder / "sampler_spec.json").read_text())
    pipeline = LTXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()  # see conftest.unmap
    return record, pipeline


class TokenNoise(RowGenerators):
    """Draws noise as the stock scheduler does: of tokens [B, L, C], from the global generator."""

    def normal(self, shape: Any) -> Tensor:
        return unpack(torch.randn(len(self), 18, shape[0]), SIZE)


def sampled_by_both(run: Run, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Sample with the stock pipeline of an export, and with the trainer's adapter at the pipeline's
    own noise levels and at those of the sampler."""
    record, pipeline = exported(folder)
    noise = torch.randn(1, 8, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = pipeline(
            prompt=PROMPT, negative_prompt=NEGATIVE, latents=pack(noise).contiguous(),
            output_type="latent", **record["call"],
        ).frames  # fmt: skip
    cond, negative = run.adapter.encode_condition([PROMPT]), run.method.conditioning.negative()
    plain = SamplerSpec(**{**record["sampler"], "timesteps": _tuple(record["sampler"])})
    levels = pipeline.scheduler.sigmas[:-1].double()
    exact = evolve(plain, shift=1.0, timesteps=tuple((1000 * levels).tolist()))

    def ours(spec: SamplerSpec) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return run.adapter.sample(
                "student", spec, noise, cond, neg_cond=negative,
                generators=TokenNoise([torch.Generator()]),
            )  # fmt: skip

    return unpack(theirs, SIZE), ours(exact), ours(plain)


def _tuple(sampler: Mapping[str, Any]) -> tuple[float, ...] | None:
    return None if sampler["timesteps"] is None else tuple(sampler["timesteps"])


@pytest.mark.parametrize("method", ["ladd", "rcm"])
def test_stock_code_samples_what_a_method_trained(run_file, folder_of, tmp_path, method):
    run = train(run_file(method))
    lines = read_losses(tmp_path / "out")
    assert list(lines) == [1, 2, 3, 4]
    start = load_file(folder_of("0.9.1") / "transformer" / "diffusion_pytorch_model.safetensors")
    assert 1e-4 < largest_difference(start, read_weights(tmp_path / "out")) < 0.1
    theirs, exact, plain = sampled_by_both(run, tmp_path / "out" / "student")
    assert torch.equal(theirs, exact)
    # LTXPipeline's grid is rounded to fp32 before it is shifted.
    assert (theirs - plain).abs().max() < 1e-5
    assert theirs.std() > 0.1


def test_lora_roles_share_the_teachers_weights_and_come_out_merged_and_as_a_file(
    run_file, tmp_path
):
    export = [
        {"role": "student", "folder": "student", "verify": True},
        {"role": "student", "folder": "lora", "format": "lora", "verify": True},
    ]
    file = run_file("dmd2", checkpoint={"export": export})
    values = yaml.safe_load(file.read_text())
    for name in ("student", "critic"):
        values["models"][name] = {"base": "teacher", "lora": {"rank": 2}}
    values["models"] = {n: values["models"][n] for n in ("teacher", "student", "critic")}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    run = train(file)
    trained = run.bundle["student"].trained
    assert trained is not None
    layers = {name.split(".lora_")[0].split(".", 3)[-1] for name in trained["transformer"]}
    assert layers == {"to_q", "to_k", "to_v", "to_out.0"}
    theirs, exact, _ = sampled_by_both(run, tmp_path / "out" / "student")
    # W x + B A x, and (W + B A) x.
    assert (theirs - exact).abs().max() < 1e-4
    _, pipeline = exported(tmp_path / "out" / "student")
    names = {f.name for f in (tmp_path / "out" / "lora").iterdir()}
    assert "pytorch_lora_weights.safetensors" in names
    pipeline.load_lora_weights(tmp_path / "out" / "lora")


@pytest.mark.parametrize("method", slow_but(("dmd2",), ("finetune", "dmd2")))
def test_two_processes_that_shard_train_as_one_does(run_file, tmp_path, method):
    fsdp = {"distributed": {"strategy": "fsdp2"}, "batch_size_per_device": 1}
    one = run_file(method, out="one")
    two = run_file(method, out="two", training=fsdp)
    assert run_on_ranks(train_rank, one, size=1) == [""]
    assert run_on_ranks(train_rank, two, size=2) == ["", ""]
    a, b = read_losses(tmp_path / "one"), read_losses(tmp_path / "two")
    assert len(a) == 4
    for iteration, numbers in a.items():
        for name, value in numbers.items():
            if name.startswith("loss/"):
                assert b[iteration][name] == pytest.approx(value, rel=2e-4), (iteration, name)
    assert_weights_alike(read_weights(tmp_path / "one"), read_weights(tmp_path / "two"))


def test_a_flash_kernel_is_one_problem_of_the_file_with_its_reason(run_file):
    file = run_file("finetune", models={"student": {"attention_backend": "flash"}})
    with pytest.raises(ConfigError) as excinfo:
        read_config(file)
    (problem,) = excinfo.value.problems
    assert (
        "models.student.attention_backend: attention backend 'flash' cannot add a bias" in problem
    )
    assert "LTXVideoTransformer3DModel hides the padding of a text by one" in problem


def test_validation_decodes_clips(run_file, tmp_path):
    validation = {
        "prompts": [PROMPT, "a"], "views": {"student": {"role": "student"}}, "fps": 24,
    }  # fmt: skip
    run_app(read_config(run_file("finetune", 1, validation=validation)))
    assert (tmp_path / "out" / "validation" / "iteration-000001" / "student" / "001.mp4").is_file()


def test_a_run_on_clips_that_go_on_from_frames_and_end_in_one(run_file, folder_of, tmp_path):
    """0.9.7: from clips to a data set, a trained student, validation and an export."""
    source = str(folder_of("0.9.7"))
    adapter = PLUGIN.adapter(ModelBundle({}), LTXPipelineConfig(**CLIP), source=source)
    generator = torch.Generator().manual_seed(0)
    clips = [(f"{i}", PROMPT, torch.rand(3, 17, 64, 96, generator=generator)) for i in range(4)]
    with ShardWriter(tmp_path / "pairs") as writer:
        preprocess(
            clips, adapter, writer, negative_prompt=NEGATIVE, first_frames=9, last_frame=True
        )
    for number, (_, _, clip) in enumerate(clips[:2]):
        frames = (clip * 255).byte().permute(1, 2, 3, 0).numpy()
        write_mp4(frames, tmp_path / f"{number}.mp4", fps=24, smallest_side=1)
        Image.fromarray(frames[-1]).save(tmp_path / f"{number}.png")
    validation = {
        "prompts": [PROMPT, "a"], "views": {"student": {"role": "student"}}, "fps": 24,
        "videos": [str(tmp_path / f"{n}.mp4") for n in (0, 1)], "video_frames": 9,
        "last_images": [str(tmp_path / f"{n}.png") for n in (0, 1)],
    }  # fmt: skip
    file = run_file(
        "dmd2", 4, data={"path": str(tmp_path / "pairs")}, validation=validation,
        models={name: {"path": source} for name in METHODS["dmd2"][0]},
    )  # fmt: skip
    run_app(read_config(file))
    start = load_file(folder_of("0.9.7") / "transformer" / "diffusion_pytorch_model.safetensors")
    assert 1e-4 < largest_difference(start, read_weights(tmp_path / "out")) < 0.1
    folder = tmp_path / "out" / "validation" / "iteration-000004" / "student"
    one, two = (read_mp4(folder / name) for name in ("000.mp4", "001.mp4"))
    assert (one != two).any()
    record = json.loads((tmp_path / "out" / "student" / "sampler_spec.json").read_text())
    assert record["call"]["timesteps"] == [1000.0, 700.0]
    assert record["timestep_deviation"] < 1e-3
    assert any("stochastic sampling goes wrong" in note for note in record["notes"])


@pytest.mark.parametrize("name", ["dmd2_2b", "finetune_2b"])
def test_shipped_run_files_are_planned_without_weights(name, capsys):
    file = Path(__file__).parents[2] / "configs" / "ltx" / f"{name}.yaml"
    assert main(["--config", str(file), "--dry-run"]) == EXIT_INCOMPLETE
    assert "28 layers of width 2048" in capsys.readouterr().out
