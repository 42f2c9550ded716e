"""An export at the end of a run whose weights lie in parts on several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from distill_checkpoint import StoredCheckpoint
from rank_jobs import ToyExporter, exports, train_and_export
from ranks import run_on_ranks


def read_files(folder: Path) -> dict[str, bytes]:
    """Read the files of a folder by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("strategy", "size"), [("ddp", 2), ("fsdp2", 2), ("hsdp", 4), ("offload", 2), ("fsdp2", 1)]
)
def test_it_is_the_export_of_the_checkpoint_byte_for_byte(tmp_path, strategy, size):
    results = run_on_ranks(train_and_export, tmp_path, strategy, size=size)
    stored = StoredCheckpoint.open(tmp_path / "checkpoint-000003")
    for export in exports():
        alone = tmp_path / "alone" / export.folder
        weights = stored.weights(export.role, ema=export.ema)
        ToyExporter().export(None, weights, alone, None)
        expected = read_files(alone)
        del expected["request"]
        written = read_files(tmp_path / export.folder)
        assert "ema" in str(written.pop("request")) or not export.ema
        assert len(written) > 10
        assert written == expected
    for alive, asked in results[1:]:
        # Live weights are read twice, to verify them; buffers are no parts.
        parts = 2 * 6 * 3 if strategy != "ddp" else 0
        assert (alive, asked) == (0, parts)


@pytest.mark.parametrize(
    ("problem", "first", "others"),
    [
        ("raise", "CheckpointError: rank 0: disk full", "CheckpointError: rank 0: disk full"),
        ("refuse", "OutputError: disk full", "CheckpointError: rank 0: disk full"),
    ],
)
def test_a_failure_on_the_first_rank_fails_on_all(tmp_path, problem, first, others):
    outcomes = run_on_ranks(train_and_export, tmp_path, "fsdp2", problem)
    assert outcomes == [first, others]


def test_a_rank_that_dies_meanwhile_does_not_hold_up_the_first(tmp_path):
    [first, killed] = run_on_ranks(train_and_export, tmp_path, "fsdp2", "kill")
    assert not killed
    assert first.startswith("CheckpointError: rank 0 lost the others")
    assert (tmp_path / "checkpoint-000003").exists()
