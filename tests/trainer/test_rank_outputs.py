"""What several ranks write: numbers of all of them, once; dumps and traces of each."""

from __future__ import annotations

import json
from pathlib import Path

import monitor_ranks
import pytest
from ranks import run_on_ranks
from safetensors.torch import load_file


def test_numbers_are_means_over_ranks_and_rank_0s_to_write(tmp_path: Path) -> None:
    (scalars, texts, closed, lines, losses), other = run_on_ranks(
        monitor_ranks.train_with_outputs, tmp_path
    )
    assert other[:4] == ([], 0, True, ""), "rank 1 writes nothing, but lets go of its tracker"
    assert (texts, closed) == (1, True)
    assert [line.split(" ")[0] for line in lines.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]
    for line, *both in zip(lines.splitlines(), losses, other[4], strict=True):
        assert f" {sum(both) / 2:.4g} " in line, "of all ranks"
    assert [iteration for iteration, _ in scalars] == [2, 4]
    for turn, (_, numbers) in enumerate(scalars):
        both = [loss for rank in (losses, other[4]) for loss in rank[2 * turn : 2 * turn + 2]]
        assert numbers["loss/total_loss"] == pytest.approx(sum(both) / 4)
        assert numbers["rank"] == 0.5
        assert numbers["updates/student.net"] == turn + 1
        assert (numbers["loss/sum"], numbers["sum_out"]) == (3.0, 3.0), "a sharded sum in full"
    assert [numbers["odd"] for _, numbers in scalars] == [10.0, 30.0], "of those that have it"


def test_dumps_and_traces_of_several_ranks_have_their_numbers(tmp_path: Path) -> None:
    run_on_ranks(monitor_ranks.train_with_outputs, tmp_path)
    folders = sorted(path.name for path in (tmp_path / "debug").iterdir())
    assert folders == ["iteration-000003-rank-0", "iteration-000003-rank-1"]
    for rank, name in enumerate(folders):
        rows = load_file(tmp_path / "debug" / name / "outputs.safetensors")["rows"]
        assert rows.tolist() == [2.0 * rank, 2.0 * rank + 1], "its own part"
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["trace-000002-000002.json"]
    assert run_on_ranks(monitor_ranks.trace_all, tmp_path / "all") == ["no error", "no error"]
    assert sorted(path.name for path in (tmp_path / "all" / "profile").iterdir()) == [
        "trace-000002-000002-rank-0.json",
        "trace-000002-000002-rank-1.json",
    ]


def test_a_dump_after_an_error_needs_no_other_rank(tmp_path: Path) -> None:
    survivor, failed = run_on_ranks(monitor_ranks.dump_an_error, tmp_path)
    assert failed.startswith("ValueError: boom")
    assert survivor.startswith("RankError")
    for rank, error in enumerate(("RankError: ", "ValueError: boom")):
        folder = tmp_path / "debug" / f"error-000003-rank-{rank}"
        step = json.loads((folder / "step.json").read_text())
        assert step["error"].startswith(error)
        assert step["last_finished_step"]["losses"]["sum"] == 3.0
        assert load_file(folder / "outputs.safetensors")["rows"].tolist() == [
            2.0 * rank,
            2.0 * rank + 1,
        ]


def test_trackers_of_a_run_file_are_rank_0s(tmp_path: Path) -> None:
    first, second = run_on_ranks(monitor_ranks.named_trackers, tmp_path)
    assert first == ["metrics.jsonl", "tensorboard"]
    assert second == []
