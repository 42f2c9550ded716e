"""A run that resumes under another file: problems before models are loaded, and what applies."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distill_protocols import ConfigError
from distill_runfile import describe
from distill_runfile.read import read_config
from distill_runtime import sha256_of_file
from distill_train.cli import main
from tiny_file import TINY, tiny_values, write_changed

STEPS, END = 4, 6
QUIET: dict[str, Any] = {"validation": None, "callbacks": {"report": None, "step_timer": None}}
OPTIMIZER = {"lr": 4e-4, "schedule": {"name": "cosine", "final_ratio": 0.1, "warmup_steps": 0}}


def values_of(out: Path, **training: Any) -> dict[str, Any]:
    values = tiny_values("finetune")
    values["training"] |= {
        "output_dir": str(out), "global_batch_size": 2, "max_train_steps": STEPS, **training,
    }  # fmt: skip
    values["training"]["optimizer"] |= OPTIMIZER
    values["checkpoint"] = {"every_steps": STEPS, "resume": "latest"}
    return values


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory) -> Path:
    """Train four steps; no test changes the output folder."""
    folder = tmp_path_factory.mktemp("run")
    file = write_changed(folder / "run.yaml", values_of(folder / "out"), QUIET)
    assert main(["--config", str(file)]) == 0
    return folder / "out"


@pytest.fixture
def write(trained_folder, tmp_path) -> Callable[..., Path]:
    """Write a run file that goes on in a copy of the trained folder, with changes."""
    out = shutil.copytree(trained_folder, tmp_path / "out")

    def write_run(**changes: Any) -> Path:
        values = values_of(out, max_train_steps=END)
        return write_changed(tmp_path / "run.yaml", values, {**QUIET, **changes})

    return write_run


@pytest.fixture
def other_data(tmp_path) -> Path:
    """Copy the shipped data set and flip one bit of it."""
    folder = Path(shutil.copytree(TINY / "data", tmp_path / "data"))
    [shard] = folder.glob("shard-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["sha256"] = sha256_of_file(shard)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def problems(file: Path) -> str:
    with pytest.raises(ConfigError) as excinfo:
        read_config(file, planning=True)
    return str(excinfo.value)


def test_another_learning_rate_keeps_the_moments_and_is_logged_in_one_line(write, caplog):
    file = write(training={"optimizer": {"lr": 2e-4}})
    line = "the optimizer of student goes on with lr 0.0004 -> 0.0002; its moments and its count"
    assert describe(read_config(file, planning=True)).count(line) == 1
    with caplog.at_level(logging.WARNING):
        assert main(["--config", str(file)]) == 0
    assert sum(line in record.getMessage() for record in caplog.records) == 1
    assert not any("training.optimizer.lr" in record.getMessage() for record in caplog.records)
    out = Path(read_config(file, planning=True).training.output_dir)
    stored = out / f"checkpoint-{END:06d}" / "optimizers" / "student.transformer.json"
    [group] = json.loads(stored.read_text())["param_groups"]
    # The whole run's schedule, at its end, of the new rate.
    assert group["lr"] == pytest.approx(2e-4 * 0.1)
    state = json.loads(stored.read_text())["state"]
    assert {moment["step"]["$scalar"][1] for moment in state.values()} == {END}


def test_other_decays_of_the_moments_are_a_problem_of_the_file(write):
    reported = problems(write(training={"optimizer": {"betas": [0.5, 0.9]}}))
    assert "models.student.optimizer" in reported
    assert "added: [optimizers.student]" in reported
    rule = {"added": ["optimizers.student"], "dropped": ["optimizers.student"]}
    file = write(training={"optimizer": {"betas": [0.5, 0.9]}}, checkpoint={"changes": rule})
    read_config(file, planning=True)


def test_another_data_set_needs_a_rule(write, other_data, caplog):
    reported = problems(write(data={"path": str(other_data)}))
    assert ": data.path: " in reported
    assert "the data set holds other samples" in reported
    rule = {"added": ["data"], "dropped": ["data"]}
    file = write(data={"path": str(other_data)}, checkpoint={"changes": rule})
    with caplog.at_level(logging.WARNING):
        assert main(["--config", str(file)]) == 0
    message = "data is dropped and added (changes): another data set"
    assert sum(message in record.getMessage() for record in caplog.records) == 1
    out = Path(read_config(file, planning=True).training.output_dir)
    position = json.loads((out / f"checkpoint-{END:06d}" / "loader.json").read_text())
    [state] = position.values()
    assert state["samples_given"] == 2 * (END - STEPS)


def test_a_data_set_that_is_copied_elsewhere_is_the_same(write, tmp_path):
    shutil.copytree(TINY / "data", tmp_path / "moved")
    read_config(write(data={"path": str(tmp_path / "moved")}), planning=True)
