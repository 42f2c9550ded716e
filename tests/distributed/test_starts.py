"""Runs of several processes that do not start: all of them end, soon, and leave nothing."""

from __future__ import annotations

import pytest
import yaml
from app_ranks import run_file, train, train_own, train_with_failing_rank
from ranks import run_on_ranks

FEW = {"max_train_steps": 1, "global_batch_size": 2}


def test_ranks_with_other_run_files_take_no_folder(tmp_path):
    file = run_file(tmp_path / "run.yaml", "finetune", training=FEW, checkpoint={"resume": "none"})
    values = yaml.safe_load(file.read_text())
    values["training"]["seed"] += 1
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(values))
    for outcome in run_on_ranks(train_own, [file, other]):
        assert outcome.startswith("RankError: rank 1 differs from rank 0 in training.seed"), outcome
    assert not (tmp_path / "run").exists()
    assert run_on_ranks(train, file) == ["", ""]


# Before what they do together in loading; before what they do in training.
@pytest.mark.parametrize("what", ["_start_weights", "LatentDataset", "_callbacks"])
def test_a_reading_error_on_one_rank_ends_all(tmp_path, what):
    file = run_file(tmp_path / "run.yaml", "finetune", training=FEW)
    (first, waited), (second, _) = run_on_ranks(train_with_failing_rank, file, what)
    assert second == "DataError: no such file on this machine"
    assert first.startswith("RankError: "), first
    if what != "_callbacks":
        assert "no such file on this machine" in first
    assert waited < 60  # the patience of a load is half an hour
    assert not (tmp_path / "run").exists()
