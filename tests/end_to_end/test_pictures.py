"""Families of pictures, from a folder of PNG files to PNG files, by the apps alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from distill_preprocess.cli import main as preprocess
from distill_runfile.cli import EXIT_OK
from distill_sample.cli import main as sample
from distill_train.cli import main as train
from family_fixtures import qwen_image_folder, z_image_folder
from media_files import quarters, write_picture
from PIL import Image

__all__ = ["qwen_image_folder", "z_image_folder"]

PROMPT, NEGATIVE = "a seven moving left", "moving"
SIZE = {"height": 32, "width": 48}
BASED = {"base": "teacher", "lora": {"rank": 2}}
FORMATS = {"qwen_image": ["lora", "comfyui"], "z_image": ["lora"]}


@pytest.fixture(scope="module", params=["qwen_image", "z_image"])
def family(request) -> tuple[str, Path]:
    """Return its name and the folder of a tiny model."""
    return request.param, request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(scope="module")
def data(family, tmp_path_factory) -> Path:
    """Make a data set of a folder of pictures with captions."""
    name, model = family
    root = tmp_path_factory.mktemp(name)
    for number, frame in enumerate(quarters(4)):
        path = write_picture(root / "pictures" / f"{number}.png", frame)
        path.with_suffix(".txt").write_text(PROMPT)
    values = {
        "recipe": {"family": name},
        "models": {"teacher": {"path": str(model)}},
        "pipeline_config": {**SIZE, "max_sequence_length": 16},
        "conditioning": {"negative_prompt": NEGATIVE},
        "preprocess": {
            "output_dir": "./data", "sources": [{"folder": str(root / "pictures")}],
            "cpu_threads": 1, "device": "cpu",
        },
    }  # fmt: skip
    file = root / "data.yaml"
    file.write_text(yaml.safe_dump(values))
    assert preprocess(["--config", str(file)]) == EXIT_OK
    return root / "data"


def write_run(
    family: tuple[str, Path], data: Path, folder: Path, models: dict[str, Any], **sections: Any
) -> Path:
    """Write a run of four iterations; ``sections`` are laid over its own."""
    name, model = family
    method = "dmd2" if "critic" in models else "finetune"
    options = {"generator_update_interval": 2, "real_score_guidance_scale": 3.0}
    values = {
        "recipe": {"family": name, "method": method},
        "models": {role: keys or {"path": str(model)} for role, keys in models.items()},
        "training": {
            "output_dir": str(folder / "out"), "max_train_steps": 4, "progress": False,
            "global_batch_size": 2, "log_every": 1, "trackers": ["jsonl"],
            "optimizer": {"lr": 1e-3}, **sections.pop("training", {}),
        },
        "data": {"path": str(data)},
        "pipeline_config": {**SIZE, "max_sequence_length": 16},
        "method_config": {
            **(options if method == "dmd2" else {}),
            "student_sampler": {"steps": 2, "timesteps": [1000, 700]},
        },
        **sections,
    }  # fmt: skip
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def test_pictures_become_pictures(family, data, tmp_path):
    """LoRA roles beside their teacher, and every export of the family, verified."""
    formats = ["diffusers", *FORMATS[family[0]]]
    file = write_run(
        family, data, tmp_path, {"teacher": {}, "student": BASED, "critic": BASED},
        validation={
            "prompts": [PROMPT, "a"], "every_steps": 4, "views": {"student": {"role": "student"}},
        },
        checkpoint={
            "export": [
                {"role": "student", "folder": one, "format": one, "verify": True}
                for one in formats
            ],
        },
    )  # fmt: skip
    assert train(["--config", str(file)]) == EXIT_OK
    out = tmp_path / "out"
    with Image.open(out / "validation" / "iteration-000004" / "student" / "000.png") as picture:
        assert picture.width * SIZE["height"] == picture.height * SIZE["width"]
    assert not list(out.rglob("*.mp4"))
    assert "data:image" in (out / "report.html").read_text()
    for name in formats:
        record = json.loads((out / name / "sampler_spec.json").read_text())
        assert record["format"] == name
    to = tmp_path / "to"
    assert sample([str(out / "diffusers"), "--prompt", PROMPT, "--to", str(to)]) == EXIT_OK
    with Image.open(to / "000-a-seven-moving-left-student.png") as picture:
        assert picture.size == (48, 32)
