"""A foreign file through the app, and the run file that it suggests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from distill_migrate.cli import main
from distill_runfile.schema import InitFromConfig
from safetensors.torch import load_file

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny"


@pytest.fixture
def ode_init(tmp_path) -> Path:
    state = load_file(TINY / "wan" / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.save({"generator": state}, tmp_path / "ode_init.pt")
    return tmp_path / "ode_init.pt"


def test_the_line_that_it_says_to_write_can_be_written(ode_init, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--from", "ode_init.pt", "--to", "outputs/migrated"]) == 0
    # Relative to here, ``outputs/migrated`` would be a hub id in a run file.
    line = yaml.safe_load(capsys.readouterr().out.splitlines()[-1])
    start = InitFromConfig(**line["init_from"])
    assert start.path == str(tmp_path / "outputs" / "migrated")
    assert (Path(start.path) / "manifest.json").is_file()


def test_a_wrong_request_writes_nothing(ode_init, tmp_path, capsys):
    empty = tmp_path / "empty.pt"
    empty.touch()
    there = tmp_path / "there"
    there.mkdir()
    cases = {
        "--from: there is nothing": (tmp_path / "nowhere", tmp_path / "x", 2),
        "holds no weights that can be read": (empty, tmp_path / "x", 1),
        "exists already": (ode_init, there, 1),
    }
    for word, (source, to, status) in cases.items():
        assert main(["--from", str(source), "--to", str(to)]) == status
        assert word in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == sorted([ode_init, empty, there])
