"""What a run needs and does not find: named with the command that makes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from distill_protocols import ConfigError
from distill_runfile import read_config
from distill_trajectories.request import read_request

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the files of the tiny causal chain to a folder where nothing was run yet."""
    folder = tmp_path / "configs" / "tiny"
    folder.mkdir(parents=True)
    for shared in ("wan", "data", "judge"):
        (folder / shared).symlink_to(CONFIGS / "tiny" / shared)
    for file in (CONFIGS / "tiny").glob("*.yaml"):
        (folder / file.name).write_text(file.read_text())
    monkeypatch.chdir(tmp_path)
    return folder


def refusal(file: Path) -> str:
    with pytest.raises(ConfigError) as excinfo:
        read_config(file)
    (problem,) = excinfo.value.problems
    return problem


def test_each_file_of_the_chain_names_the_one_that_comes_before(chain, tmp_path):
    """The commands of the README, in its order."""
    first, second, third = (
        chain / f"{name}.yaml" for name in ("trajectories", "kd_causal", "self_forcing")
    )
    assert read_request(first).section.output_dir == str(tmp_path / "outputs/tiny-trajectories")
    problem = refusal(second)
    assert re.match(r"kd_causal.yaml:\d+: data.path: .*/tiny-trajectories is not there", problem)
    assert "uv run apps/trajectories --config configs/tiny/trajectories.yaml" in problem
    problem = refusal(third)
    assert re.match(r"self_forcing.yaml:\d+: models.student.init_from.path: ", problem)
    assert "uv run apps/train --config configs/tiny/kd_causal.yaml" in problem


def test_a_plan_lists_what_a_run_still_needs(chain, tmp_path):
    (missing,) = read_config(chain / "kd_causal.yaml", planning=True).missing
    assert missing.startswith(f"the data set {tmp_path}/outputs/tiny-trajectories (which `uv run")
    (missing,) = read_config(chain / "self_forcing.yaml", planning=True).missing
    assert missing.startswith("the start of student, ")
    assert read_config(chain / "dmd2.yaml", planning=True).missing == ()
    (chain / "data").unlink()
    (missing,) = read_request(chain / "trajectories.yaml", planning=True).missing
    assert missing == f"the data set {chain}/data"


@pytest.mark.parametrize("name", ["self_forcing_1.3b", "causvid_1.3b"])
def test_the_published_causal_models_chain_too(name):
    config = read_config(CONFIGS / "wan" / f"{name}.yaml", planning=True)
    start = config.roles["student"].init_from
    first = read_config(CONFIGS / "wan" / "kd_causal_1.3b.yaml", planning=True)
    (export,) = first.checkpoint.export
    assert start is not None
    assert start.path == str(Path(first.training.output_dir, export.folder))
    section = read_request(CONFIGS / "wan" / "trajectories_1.3b.yaml", planning=True).section
    assert section.output_dir == first.data.path
    assert "trajectories_1.3b.yaml" in first.missing[0]
