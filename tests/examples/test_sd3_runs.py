"""Whole runs of the app on tiny SD 3 pipelines: PNG files to data set to training to export.

The data section of a run file reads latents; pictures become such by ``preprocess``, as clips of
one frame.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from distill_conditioning import ShardWriter, preprocess
from distill_protocols import ModelBundle, RowGenerators, SamplerSpec
from distill_runfile.cli import EXIT_OK, EXIT_USAGE
from distill_runfile.read import read_config
from distill_train.build import build
from distill_train.cli import main
from PIL import Image
from safetensors.torch import load_file
from tiny_run import one_process

HEIGHT, WIDTH, LENGTH = 32, 48, 8
PROMPTS, NEGATIVE = ["a seven moving left", "a"], "moving"
LORA = {"lora": {"rank": 3, "alpha": 6}}
STUDENT_SAMPLER = {"steps": 2, "timesteps": [1000, 700]}
METHODS = {
    "finetune": ("finetune", {"student_sampler": {"steps": 4, "shift": 3.0, "guidance": 2.0}}, {}),
    "dmd2": (
        "dmd2",
        {
            "generator_update_interval": 2,
            "real_score_guidance_scale": 2.0,
            "student_sampler": STUDENT_SAMPLER,
        },
        {"teacher": {}, "critic": {}},
    ),
}
"""By method: method_config, and roles beside the student."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Four PNG files."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(4):
        picture = Image.new("RGB", (WIDTH, HEIGHT), (60 * index, 40, 255 - 60 * index))
        picture.paste((255, 255, 255), (8 * index, 4, 8 * index + 12, 20))
        picture.save(folder / f"{index}.png")
    return folder


def read_picture(file: Path) -> torch.Tensor:
    """Return [3, 1, H, W] in [0, 1]."""
    pixels = torch.from_numpy(np.array(Image.open(file)))
    return pixels.permute(2, 0, 1).unsqueeze(1) / 255


@pytest.fixture(scope="module")
def data(sd3, folders, pictures, tmp_path_factory):
    """Return the data set of a version, made of the PNG files on first use."""
    root = tmp_path_factory.mktemp("data")

    def data(version: str) -> Path:
        if not (root / version).exists():
            config = sd3.config.SD3PipelineConfig(
                height=HEIGHT, width=WIDTH, max_sequence_length=LENGTH
            )
            path = str(folders(version))
            adapter = sd3.plugin.PLUGIN.adapter(ModelBundle({}), config, source=path)
            clips = (
                (file.stem, PROMPTS[0], read_picture(file)) for file in sorted(pictures.iterdir())
            )
            with ShardWriter(root / version) as writer:
                assert preprocess(clips, adapter, writer, negative_prompt=NEGATIVE) == 4
        return root / version

    return data


@pytest.fixture
def values(data, folders, tmp_path):
    """Return the values of a run file."""

    def values(method="finetune", *, version="3-medium", student=None, out="out", steps=4):
        name, options, roles = METHODS[method]
        roles = {"student": student or {}, **roles}
        if student and "critic" in roles:
            roles["critic"] = student
        exports = [{"role": "student", "folder": "student", "verify": True}]
        if student:
            exports.append({**exports[0], "folder": "lora", "format": "lora"})
        return {
            "recipe": {"family": "sd3", "method": name},
            "models": {r: {"path": str(folders(version)), **keys} for r, keys in roles.items()},
            "training": {
                "output_dir": str(tmp_path / out), "max_train_steps": steps,
                "global_batch_size": 2, "trackers": [], "progress": False,
                "optimizer": {"lr": 1e-2, "schedule": {"name": "constant"}},
            },
            "data": {"path": str(data(version))},
            "pipeline_config": {
                "height": HEIGHT, "width": WIDTH, "max_sequence_length": LENGTH,
            },
            "method_config": options,
            "checkpoint": {"every_steps": 2, "export": exports},
        }  # fmt: skip

    return values


def write(values, tmp_path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {
        f"{file.relative_to(checkpoint)}: {name}": value
        for file in files
        for name, value in load_file(file).items()
    }


def trained(values, tmp_path):
    """Run in this process; return its parts."""
    run = build(read_config(write(values, tmp_path)), distribution=one_process())
    run.trainer.run(run.method, run.loader)
    run.method.set_trainable("student", False)
    return run


def stock_from(folder: Path, **absent):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def both_latents(run, pipeline, call, spec=None):
    """Sample by the run's adapter and by the stock pipeline from one noise."""
    adapter, spec = run.adapter, spec or run.method.sampler_spec
    noise = RowGenerators.seeded(5, "noise", [0, 1]).normal(adapter.latent_shape)
    ours = adapter.sample(
        "student",
        spec,
        noise,
        adapter.encode_condition(PROMPTS),
        # Both rows at once, as the pipeline: one row alone is encoded with other rounding.
        neg_cond=adapter.encode_condition([NEGATIVE] * len(PROMPTS)),
    )
    theirs = pipeline(
        PROMPTS,
        negative_prompt=[NEGATIVE] * len(PROMPTS),
        latents=noise.squeeze(2),
        output_type="latent",
        **call,
    ).images
    assert ours.shape == (2, 4, 1, 4, 6)
    assert (ours - noise).abs().max() > 0.1
    return ours.squeeze(2), theirs


@pytest.mark.parametrize("version", ["3-medium-without-t5", "3.5-medium"])
def test_the_stock_pipeline_gives_the_latents_of_an_exported_student(values, tmp_path, version):
    """Guided and unguided, bit for bit."""
    run = trained(values(version=version), tmp_path)
    folder = tmp_path / "out" / "student"
    record = json.loads((folder / "sampler_spec.json").read_text())
    absent = {}
    if version == "3-medium-without-t5":
        absent = dict.fromkeys(("text_encoder_3", "tokenizer_3"))
        assert any("text_encoder_3=None" in note for note in record["notes"])
    pipeline = stock_from(folder, **absent)
    assert record["call"]["max_sequence_length"] == LENGTH
    ours, theirs = both_latents(run, pipeline, record["call"])
    assert torch.equal(ours, theirs)
    unguided = SamplerSpec(steps=4, shift=3.0)
    ours, theirs = both_latents(run, pipeline, {**record["call"], "guidance_scale": 1.0}, unguided)
    assert torch.equal(ours, theirs)


def test_a_low_rank_student_is_resumed_and_exported_merged_and_as_a_lora_file(
    values, folders, tmp_path
):
    given = values("dmd2", version="3.5-medium", student=LORA)
    given["checkpoint"]["resume"] = "latest"
    out = tmp_path / "out"
    trained(given, tmp_path)
    last = out / "checkpoint-000004"
    through = weights(last)
    shutil.rmtree(last)
    run = trained(given, tmp_path)  # from iteration 2
    resumed = weights(last)
    assert resumed.keys() == through.keys()
    assert all(torch.equal(resumed[name], value) for name, value in through.items())
    # Adapters alone: the table of positions is the base's, which is not trained.
    saved = load_file(next((out / "checkpoint-000004").glob("roles/student/**/*.safetensors")))
    assert all(".lora_" in name for name in saved)
    assert sum(".attn2." in name for name in saved) == 0
    merged = json.loads((out / "student" / "sampler_spec.json").read_text())
    ours, theirs = both_latents(run, stock_from(out / "student"), merged["call"])
    # W x + B A x in training, (W + B A) x after merging.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)

    from diffusers import FlowMatchEulerDiscreteScheduler

    base = stock_from(folders("3.5-medium"))
    record = json.loads((out / "lora" / "sampler_spec.json").read_text())
    base.scheduler = FlowMatchEulerDiscreteScheduler.from_config(record["scheduler"])
    _, before = both_latents(run, base, record["call"])
    base.load_lora_weights(out / "lora")
    ours, theirs = both_latents(run, base, record["call"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert (before - theirs).abs().max() > 1e-3


def test_the_installed_family_is_all_that_the_app_needs(values, installed, tmp_path):
    """A process that only has the package on its path, from run file to export."""
    import os
    import subprocess
    import sys

    file = write(values(), tmp_path)
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "distill_train", "--config", str(file)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == EXIT_OK, result.stderr
    assert (tmp_path / "out" / "student" / "model_index.json").is_file()


def test_a_run_validates_with_its_pictures(values, tmp_path):
    given = values()
    given["validation"] = {"prompts": PROMPTS, "views": {"student": {"role": "student"}}}
    assert main(["--config", str(write(given, tmp_path))]) == EXIT_OK
    folder = tmp_path / "out" / "validation" / "iteration-000004"
    picture = Image.open(folder / "student" / "001.png")
    assert picture.height % HEIGHT == 0
    assert picture.height // HEIGHT == picture.width // WIDTH


def test_data_of_another_length_is_a_problem_of_the_file(values, tmp_path, capsys):
    given = values()
    given["pipeline_config"]["max_sequence_length"] = LENGTH + 1
    assert main(["--config", str(write(given, tmp_path))]) == EXIT_USAGE
    message = "'text' is [85, 32] in each sample, but the model reads [86, 32]"
    assert message in capsys.readouterr().err
