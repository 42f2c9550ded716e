"""Validation that is spread over ranks: what one process would show, written by rank 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ranks import run_on_ranks
from validation_ranks import GUIDED, validate


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(("prompts", "size"), [(4, 2), (5, 2), (1, 2), (5, 4)])
def test_clips_and_files_are_those_of_one_process(tmp_path: Path, prompts: int, size: int) -> None:
    alone = validate(tmp_path / "alone", prompts)
    assert alone["end"] == "whole"
    films = [f"x0/{number:03d}" for number in range(prompts)]
    assert list(alone["videos"]) == [f"validation/{n}" for n in ("live", "ema", "teacher", *films)]
    live = alone["videos"]["validation/live"]
    assert live.shape == (prompts, 3, 2, 128 + 26, 128), "enlarged, with a caption"
    assert len({clip[..., -128:, :].tobytes() for clip in live}) == prompts

    results = run_on_ranks(validate, tmp_path / "ranks", prompts, size=size)
    assert [rank["end"] for rank in results] == ["whole"] * size
    first, *others = results
    assert first["videos"].keys() == alone["videos"].keys()
    for name, clips in alone["videos"].items():
        np.testing.assert_allclose(first["videos"][name], clips, rtol=0, atol=1.01 / 255)
    assert files(tmp_path / "ranks") == files(tmp_path / "alone")
    names = [Path(name).name for name in files(tmp_path / "alone")]
    assert names.count("frames.png") == 3
    assert sum(name.endswith(".mp4") for name in names) == 4 * prompts, "three views, and x0"
    for rank in others:
        assert not rank["videos"], "rank 0 alone shows clips"
        assert rank["calls"] == first["calls"], "a sharded model gathers in each of them"
        assert rank["polls"] == first["polls"]
    assert all(rank["weights stay"] for rank in results)
    assert [len(call.t) for call in first["calls"]] == [-(-prompts // size)] * len(alone["calls"])


def test_a_stop_on_one_rank_ends_validation_on_all_at_the_same_call(tmp_path: Path) -> None:
    full = validate(tmp_path / "alone", 5)
    for number in (2, full["polls"]):
        folder = tmp_path / f"ranks-{number}"
        results = run_on_ranks(validate, folder, 5, number)
        assert [rank["end"] for rank in results] == ["stopped: preempted"] * 2
        assert [rank["polls"] for rank in results] == [number] * 2
        assert results[0]["calls"] == results[1]["calls"]
        assert len(results[0]["calls"]) < len(full["calls"]) or number == full["polls"]
        assert all(rank["weights stay"] for rank in results)
        assert not any(rank["videos"] for rank in results)
        # What is kept is whole by itself.
        assert not any("iteration" in name or "over_time" in name for name in files(folder))


def test_what_is_kept_is_never_sampled_again(tmp_path: Path) -> None:
    """Neither its clips nor the latents that predictions start from, unless they are gone."""
    first, second = (validate(tmp_path, 2) for _ in range(2))
    by_teacher = [call for call in first["calls"] if call.cfg == GUIDED.guidance]
    assert by_teacher
    assert len(second["calls"]) == len(first["calls"]) - len(by_teacher)
    assert not [call for call in second["calls"] if call.cfg == GUIDED.guidance]
    [latents] = (tmp_path / "validation" / "kept").glob("*/latents.safetensors")
    latents.unlink()
    assert validate(tmp_path, 2)["calls"] == first["calls"]


def test_predictions_that_are_asked_for_later_make_the_kept_clips_anew(tmp_path: Path) -> None:
    """They were kept without the latents that are noised."""
    plain = validate(tmp_path, 2, x0=False)
    assert "validation/x0/000" not in plain["videos"]
    [kept] = (tmp_path / "validation" / "kept").iterdir()
    assert not (kept / "latents.safetensors").exists()
    asked = validate(tmp_path, 2)
    assert [call for call in asked["calls"] if call.cfg == GUIDED.guidance]
    assert (kept / "latents.safetensors").is_file()
    assert (asked["videos"]["validation/teacher"] == plain["videos"]["validation/teacher"]).all()
    films = [asked["videos"][f"validation/x0/{n:03d}"] for n in range(2)]
    for film in films:
        assert film.shape[:2] == (1, 3)
        assert film.shape[2] == asked["videos"]["validation/teacher"].shape[2]


def test_a_writing_error_of_rank_0_fails_on_all(tmp_path: Path) -> None:
    (tmp_path / "validation").write_text("in the way")
    results = run_on_ranks(validate, tmp_path, 2)
    assert all(rank["end"].startswith("RankError: rank 0: ") for rank in results), results
    assert all("validation" in rank["end"] for rank in results)
