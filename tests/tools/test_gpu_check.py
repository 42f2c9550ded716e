"""The check of a device still runs: on the CPU, at tiny size, where it can."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from gpu_check.__main__ import main, run_check
from gpu_check.checks import CHECKS, check_rollout
from gpu_check.runs import TINY, prepare


def test_a_rollout_is_timed_chunk_by_chunk(tmp_path: Path):
    prepare(tmp_path, TINY)
    times, growth, share = check_rollout(tmp_path, TINY)
    assert len(times.measured.split(",")) == 3  # latent frames, one a chunk
    assert (growth.good, share.good) == (None, None)  # not for a CPU to say


@pytest.mark.slow
def test_a_check_that_breaks_is_a_row(tmp_path: Path):
    [row] = run_check("memory", tmp_path, cpu=True)  # no models were prepared there
    assert row.good is False
    assert "wan" in row.measured


@pytest.mark.slow
def test_every_check_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--cpu", "--output", str(tmp_path)])
    assert main() == 0
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["device"] == "CPU"
    assert len(found["rows"]) > 2 * len(CHECKS)
    assert "| resumed run | equal to the bit |" in (tmp_path / "gpu_check.md").read_text()
