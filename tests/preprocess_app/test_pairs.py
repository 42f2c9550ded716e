"""ODE pairs of CausVid, Self-Forcing and FastVideo become a data set of trajectories."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
import yaml
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_conditioning import DataConfig, LatentDataset, dataset_info
from distill_preprocess.cli import main
from distill_protocols import ModelBundle
from distill_runfile.cli import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from preprocess_requests import PIPELINE, TINY, write_request
from stored_files import WIDTH, columns, write_lmdb, write_parquet

TIMES = [1000.0, 757.0, 522.0]
PROMPTS = ["the digit one moving up", "the digit two moving left", "the digit one moving up"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    """Return pairs [N, S, T, C, H, W] whose values float16 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 3, 8, 4, 4, generator=generator).half().float()


def request(tmp_path: Path, path: Path, **changes: Any) -> str:
    pairs = {"path": str(path), "times": TIMES, **changes.pop("ode_pairs", {})}
    file = write_request(tmp_path, **{"clips": {}, "ode_pairs": pairs, **changes})
    values = yaml.safe_load(file.read_text())
    if "sources" not in changes:
        del values["preprocess"]["sources"]
    file.write_text(yaml.safe_dump(values))
    return str(file)


def write_files(folder: Path, states: torch.Tensor) -> None:
    folder.mkdir()
    for number, (prompt, value) in enumerate(zip(PROMPTS, states, strict=True)):
        torch.save({prompt: value[None]}, folder / f"{number:05d}.pt")


def write_one_file(folder: Path, states: torch.Tensor) -> None:
    folder.mkdir()
    torch.save({"prompts": PROMPTS, "latents": [s[None] for s in states]}, folder / "all.pt")


LAYOUTS = {
    "files": write_files,
    "one": write_one_file,
    "lmdb": lambda folder, states: write_lmdb(folder, PROMPTS, states.numpy()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_and_clips_are_those_of_the_pairs(tmp_path, states, layout, capsys):
    LAYOUTS[layout](tmp_path / "pairs", states)
    file = request(tmp_path, tmp_path / "pairs")
    assert main(["--config", file, "--dry-run"]) == EXIT_OK
    assert "states at t = 1000, 757, 522, and the clip" in capsys.readouterr().out
    assert main(["--config", file]) == EXIT_OK
    info = dataset_info(tmp_path / "data", times=(757.0,))
    assert (info.problems, info.samples, info.negative_prompt) == ((), 3, "")
    data = LatentDataset(DataConfig(path=str(tmp_path / "data"), verify="full"), times=(*TIMES,))
    batch = data.read(torch.arange(3))
    ours = states.transpose(2, 3)  # [N, S, C, T, H, W]
    assert torch.equal(batch.trajectory, ours[:, :3])
    adapter = PLUGIN.adapter(
        ModelBundle({}), WanPipelineConfig(**PIPELINE), source=str(TINY / "wan")
    )
    assert torch.equal(batch.latents, adapter.denormalize_latents(ours[:, 3]))
    assert [data.caption(number) for number in range(3)] == PROMPTS
    text = adapter.encode_condition(PROMPTS).tensors["text"]
    assert torch.equal(batch.cond.tensors["text"], text)
    entries = {name.partition(".")[0] for name in info.index.fingerprint}
    assert "text_encoder" in entries
    assert "vae" not in entries  # nobody knows which one it was


def test_clips_without_states_are_latents(tmp_path, states):
    write_lmdb(tmp_path / "latents", PROMPTS, states[:, -1].numpy())
    file = request(tmp_path, tmp_path / "latents", ode_pairs={"times": []})
    assert main(["--config", file]) == EXIT_OK
    info = dataset_info(tmp_path / "data")
    assert info.problems == ()
    assert info.index.trajectory_times == ()


def test_trajectories_of_fastvideo_are_those_of_the_next_step(tmp_path, states, capsys):
    # Each step's t; what is stored is the state after it.
    began = np.array([1000, 995, 937, 833], np.float32)
    rows = []
    for number, own in enumerate(states.transpose(2, 3).numpy()):  # [S, C, T, H, W]
        row = {"id": f"text_{number}", "caption": PROMPTS[number], "media_type": "text"}
        row |= columns("text_embedding", np.zeros((5, WIDTH), np.float32), "float32")
        row |= columns("trajectory_latents", own[None], "float32")
        rows.append(row | columns("trajectory_timesteps", began, "float32"))
    rows.append(rows[0] | {"id": "other"} | columns("trajectory_timesteps", began / 2, "float32"))
    write_parquet(tmp_path / "ode/data_chunk_0.parquet", rows)
    file = request(tmp_path, tmp_path / "ode", ode_pairs={"times": [995.0, 833.0]})
    assert main(["--config", file]) == EXIT_OK
    report = (tmp_path / "data/report.jsonl").read_text()
    assert "no level t = 995 among those stored (497.5, 468.5, 416.5, 0)" in report
    data = LatentDataset(DataConfig(path=str(tmp_path / "data")), times=(995.0, 833.0))
    batch = data.read(torch.arange(3))
    ours = states.transpose(2, 3)
    assert torch.equal(batch.trajectory, ours[:, [0, 2]])
    adapter = PLUGIN.adapter(
        ModelBundle({}), WanPipelineConfig(**PIPELINE), source=str(TINY / "wan")
    )
    assert torch.equal(batch.latents, adapter.denormalize_latents(ours[:, 3]))
    assert [data.caption(number) for number in range(len(data))] == PROMPTS
    wrong = write_request(tmp_path, sources=[{"latents": "./ode"}], output_dir="./latents")
    assert main(["--config", str(wrong)]) == EXIT_FAILED
    assert "become data for kd by ode_pairs" in capsys.readouterr().err


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_what_cannot_be_used_is_named_and_no_code_runs(tmp_path, states):
    files = tmp_path / "pairs"
    write_files(files, states)
    torch.save({"a": Runs(tmp_path / "ran")}, files / "code.pt")
    (files / "cut.pt").write_bytes((files / "00000.pt").read_bytes()[:2000])
    torch.save({"less": states[0][None, :3]}, files / "less.pt")
    torch.save({"large": torch.zeros(1, 4, 3, 8, 4, 6)}, files / "large.pt")
    torch.save({"flat": torch.zeros(4, 4)}, files / "flat.pt")
    torch.save({"infinite": states[0][None] / 0}, files / "infinite.pt")
    torch.save([states[0]], files / "list.pt")
    assert main(["--config", request(tmp_path, files)]) == EXIT_OK
    assert not (tmp_path / "ran").exists()
    lines = (tmp_path / "data/report.jsonl").read_text().splitlines()
    said = {line["id"]: line["skipped"] for line in map(json.loads, lines)}
    expected = {
        "code.pt": "names code that would have to run", "cut.pt": "it is damaged, or",
        "less.pt": "it has 3 states, and times names 3 levels",
        "large.pt": "[8, 3, 4, 6] [C, T, H, W], and the models take [8, 3, 4, 4]",
        "flat.pt": "must be [1, S, T, C, H, W]", "infinite.pt": "not finite",
        "list.pt": "holds a list, and not {prompt: states}",
    }  # fmt: skip
    assert said.keys() == expected.keys()
    for name, text in expected.items():
        assert text in said[name], (name, said[name])
    assert dataset_info(tmp_path / "data").samples == 3


def test_an_lmdb_of_other_things_and_damaged_rows(tmp_path, states, capsys):
    write_lmdb(tmp_path / "pairs", PROMPTS, states.numpy())
    path = str(tmp_path / "pairs")
    with lmdb.open(path, map_size=1 << 24) as database, database.begin(write=True) as transaction:
        transaction.put(b"latents_1_data", b"short")
        transaction.delete(b"prompts_2_data")
    assert main(["--config", request(tmp_path, tmp_path / "pairs")]) == EXIT_OK
    report = (tmp_path / "data/report.jsonl").read_text()
    assert "it has 5 bytes, and [4, 3, 8, 4, 4] of float16 has 3072" in report
    assert "there is no prompts_2_data" in report
    assert dataset_info(tmp_path / "data").samples == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other/data.mdb").write_bytes(b"no database" * 999)
    assert main(["--config", request(tmp_path, tmp_path / "other")]) == EXIT_FAILED
    assert "is no LMDB of ODE pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"sources": [{"folder": "./clips"}]}, "ode_pairs stands beside sources"),
        ({"ode_pairs": {"times": [500.0, 900.0]}}, "must fall strictly"),
        ({"ode_pairs": {"times": [1000.0, 0.0]}}, "is always the last state"),
        ({"ode_pairs": {"path": "./gone"}}, "there is no "),
        ({"captions": {"prefix": "a "}}, "belong to its prompt"),
        ({"first_frames": True}, "and no first frames"),
        ({"output_dir": "./pairs"}, "a folder of its own"),
    ],
    ids=["both", "order", "zero", "gone", "prefix", "pictures", "same"],
)
def test_problems_of_the_file(tmp_path, changes, word, capsys):
    for name in ("pairs", "clips"):
        (tmp_path / name).mkdir()
    assert main(["--config", request(tmp_path, tmp_path / "pairs", **changes)]) == EXIT_USAGE
    assert word in capsys.readouterr().err
