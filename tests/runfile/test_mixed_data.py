"""Several data sets in a run file: what is said of them, and what is wrong with them, by key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from distill_protocols import ConfigError
from distill_runfile import describe, read_config
from distill_train.cli import EXIT_OK, main
from run_files import TINY


@pytest.fixture
def sets(tmp_path, values) -> list[dict[str, object]]:
    """Two copies of the shipped data set, which the run mixes."""
    paths = [shutil.copytree(TINY / "data", tmp_path / name) for name in ("clips", "more")]
    written = [{"path": str(path), "weight": 1.0 + 2 * n} for n, path in enumerate(paths)]
    values["data"] = {"sets": written}
    return written


def problems(path: Path, *, planning: bool = False) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_config(path, planning=planning)
    return str(caught.value).splitlines()


def test_the_plan_says_how_often_the_samples_of_each_are_seen(values, write, sets):
    text = describe(read_config(write(values)))
    section = text.partition("\ndata\n")[2].partition("\n\n")[0].splitlines()
    samples = json.loads((TINY / "data" / "index.json").read_text())["samples"]
    assert f"{2 * samples:,} samples in" in section[0]
    assert "latents [8, 3, 4, 4]; " in section[0]  # of one shape, in two data sets
    first, second = section[2:]
    assert first.split()[0] == "clips"
    assert "25.0%" in first
    assert second.split()[0] == "more"
    assert "75.0%" in second


def test_a_set_that_is_missing_or_wrong_is_named_by_its_key(values, write, sets, tmp_path):
    (tmp_path / "more" / "index.json").unlink()
    [problem] = problems(write(values))
    assert ": data.sets.1.path: " in problem
    assert "holds no index.json" in problem
    shutil.rmtree(tmp_path / "more")
    [problem] = problems(write(values))
    assert ": data.sets.1.path: " in problem
    config = read_config(write(values), planning=True)
    assert str(tmp_path / "more") in config.missing[0]
    values["training"]["output_dir"] = str(tmp_path / "clips")
    sets.pop()
    assert any("is the data set's folder" in one for one in problems(write(values)))


@pytest.mark.parametrize(
    ("data", "key", "word"),
    [
        ({}, "data", "missing"),
        ({"path": "./x", "sets": [{"path": "./y"}]}, "data.path", "beside sets"),
        ({"sets": [{"path": "./y"}, {"path": "./z/y"}]}, "data.sets", "have this name"),
        ({"sets": [{"path": "./y", "weigth": 1}]}, "data.sets.0.weigth", "did you mean 'weight'"),
    ],
    ids=["none", "both", "names", "unknown"],
)
def test_a_wrong_section_is_refused(values, write, data, key, word):
    values["data"] = data
    found = problems(write(values))
    assert any(f": {key}" in one and word in one for one in found), found


def test_a_run_of_several_sets_goes_on_with_the_same_ones_alone(values, write, sets, tmp_path):
    values["training"] |= {"max_train_steps": 5, "output_dir": str(tmp_path / "out")}
    assert main(["--config", str(write(values))]) == EXIT_OK
    values["training"]["max_train_steps"] = 6
    sets[1]["weight"] = 2.0
    [problem] = problems(write(values))
    assert ": data.sets: " in problem
    assert "'more' had weight 3.0" in problem
    sets[1]["weight"] = 3.0
    assert main(["--config", str(write(values))]) == EXIT_OK
