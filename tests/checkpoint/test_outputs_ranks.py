"""Several ranks claim one output folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from distill_checkpoint import claim_output_dir
from rank_jobs import claim
from ranks import run_on_ranks


def claims(folder: Path, *, resume: bool = True, after: str = "") -> list[str]:
    return run_on_ranks(claim, [folder] * 2, resume, after)


def test_the_first_rank_locks_the_folder_for_all(tmp_path):
    [first, second] = claims(tmp_path / "out", resume=False)
    assert first == "held"
    assert second == "held by another"


def test_all_ranks_raise_the_same_refusal(tmp_path):
    with claim_output_dir(tmp_path, resume=True):
        outcomes = claims(tmp_path)
    assert outcomes[0] == outcomes[1]
    assert f"pid {os.getpid()}" in outcomes[0]
    outcomes = claims(tmp_path, resume=False)
    assert outcomes[0] == outcomes[1]
    assert "already holds another run" in outcomes[0]
    assert claims(tmp_path)[0] == "held"


@pytest.mark.parametrize("who", ["first", "last"])
def test_a_restart_after_a_killed_rank_finds_it_free(tmp_path, who):
    killed = claims(tmp_path, resume=False, after=f"kill the {who}")
    assert killed[0 if who == "first" else 1] == ""
    assert claims(tmp_path) == ["held", "held by another"]


def test_a_run_that_did_not_start_releases_the_folder(tmp_path):
    claims(tmp_path / "out", resume=False, after="release")
    assert not (tmp_path / "out").exists()


def test_folders_of_two_hosts_are_refused(tmp_path):
    """As where the output folder is on no shared storage."""
    outcomes = run_on_ranks(claim, [tmp_path / "here", tmp_path / "there"], False, "")
    assert all("is not the" in each and "of rank 1" in each for each in outcomes)
    assert list(tmp_path.iterdir()) == []
