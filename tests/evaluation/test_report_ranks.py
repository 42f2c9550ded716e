"""Reports that are spread over ranks: numbers and pictures of one process, written by rank 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_on_ranks
from validation_ranks import run_report


def numbers(folder: Path) -> dict[str, Any]:
    """Read report.json without times."""
    report = json.loads((folder / "report.json").read_text())
    for entry in report["entries"]:
        assert entry.pop("seconds_per_clip") > 0
    return report


def flat(value: Any, path: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    flattened: dict[str, Any] = {}
    for key, item in items:
        inner = isinstance(item, dict | list)
        flattened |= flat(item, f"{path}/{key}") if inner else {f"{path}/{key}": item}
    return flattened


@pytest.mark.parametrize(
    ("prompts", "sheet_prompts", "size"), [(6, 2, 2), (5, 1, 2), (1, 3, 2), (5, 2, 3)]
)
def test_numbers_and_pictures_are_those_of_one_process(
    tmp_path: Path, prompts: int, sheet_prompts: int, size: int
) -> None:
    folders = [tmp_path / name for name in ("alone", "ranks")]
    for folder in folders:
        folder.mkdir()
    alone = run_report(folders[0], prompts, sheet_prompts, chunk=64)
    results = run_on_ranks(run_report, folders[1], prompts, sheet_prompts, 4, size=size)
    assert [rank["end"] for rank in (alone, *results)] == ["whole"] * (1 + size)

    expected, actual = (flat(numbers(folder)) for folder in folders)
    assert len({expected[f"/entries/{n}/frechet_distance"] for n in range(3)}) == 3
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        # The judge and SSIM see other batches: last bits may differ, answers do not.
        exact = not key.endswith(("frechet_distance", "/fd", "/ssim"))
        assert actual[key] == (value if exact else pytest.approx(value, rel=1e-6)), key
    shown = [name for name in ("teacher", "ema") for _ in range(sheet_prompts)]
    clips = [f"report/{n}/{i % sheet_prompts:03}.mp4" for i, n in enumerate(shown)]
    for name in ("contact_sheet.png", "clips.mp4", *clips):
        assert (folders[1] / name).read_bytes() == (folders[0] / name).read_bytes(), name

    first, *others = results
    assert first["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
    assert len(first["metrics"]) == 3 * 10 + 2 * 2, "the reference is not compared with itself"
    assert first["texts"] == 1
    assert "sampled by" in first["printed"]
    for rank in others:
        assert rank["metrics"] == first["metrics"], "checkpoints are kept by them, on all ranks"
        assert rank["calls"] == first["calls"], "a sharded model gathers in each of them"
        assert rank["polls"] == first["polls"]
        assert rank["texts"] == 0
        assert rank["printed"] == ""
    assert all(rank["weights stay"] for rank in results)


def test_a_stop_on_one_rank_ends_the_report_on_all_at_the_same_call(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    full = run_report(tmp_path / "alone", 5, 2, chunk=4)
    assert full["polls"] > 60
    for number in (3, 40):  # during the run, at its end
        folder = tmp_path / f"ranks-{number}"
        folder.mkdir()
        results = run_on_ranks(run_report, folder, 5, 2, 4, number)
        assert [rank["polls"] for rank in results] == [number] * 2
        assert results[0]["calls"] == results[1]["calls"]
        assert len({rank["end"] for rank in results}) == 1
        assert list(folder.iterdir()) == []
        printed = "report: left out, as the run was stopped (preempted)\n" if number == 40 else ""
        assert [rank["printed"] for rank in results] == [printed, ""]


def test_a_writing_error_of_rank_0_fails_on_all(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    (tmp_path / "report.json" / "in the way").touch()
    results = run_on_ranks(run_report, tmp_path, 2, 1, 4)
    assert all(rank["end"].startswith("RankError: rank 0: ") for rank in results), results
