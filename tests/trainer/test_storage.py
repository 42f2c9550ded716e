"""A full disk, or a folder that is gone: one error that names the file, and no partial output."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from distill_checkpoint import CheckpointConfig, CheckpointManager
from distill_checkpoint.manifest import inspect
from distill_checkpoint.output_folder import find_newest_checkpoint
from distill_protocols import CheckpointError, DistillError, RunState, StorageError
from distill_runfile.cli import EXIT_FAILED, EXIT_STORAGE, run_command
from distill_trainer import (
    DistillTrainer,
    JsonlTracker,
    TensorBoardTracker,
    ValidationCallback,
    ViewConfig,
)
from logged_runs import At
from toy_trainer import (
    MemoryTracker,
    Prompts,
    Sampling,
    alternating,
    batches,
    training,
    validation_config,
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root mounts file systems")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(run: RunState) -> None:
    """Use up what is left of the disk."""
    with (run.output_dir / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096):
                pass
        except OSError:
            pass


def remove(run: RunState) -> None:
    shutil.rmtree(run.output_dir)


def no_folder(run: RunState) -> None:
    shutil.rmtree(run.output_dir / "validation")
    (run.output_dir / "validation").touch()


def train(
    folder: Path, tracker: str, event: Callable[[RunState], None], *, every_steps: int = 30
) -> None:
    """Sixty iterations: a save every thirtieth, a log point in each, ``event`` in the 31st."""
    method = Sampling(alternating(1).bundle, 1)
    validation = ValidationCallback(
        validation_config(every_steps=2, views={"live": ViewConfig(role="student")}), Prompts()
    )
    if tracker == "validation":
        trackers = [MemoryTracker()]
    elif tracker == "jsonl":
        trackers = [JsonlTracker(folder / "metrics.jsonl")]
    else:
        trackers = [TensorBoardTracker(folder / "tensorboard")]
    DistillTrainer(
        training(folder, 60, log_every=1),
        callbacks=[At(31, event), *([validation] if tracker == "validation" else [])],
        trackers=trackers,
        checkpointer=CheckpointManager(CheckpointConfig(every_steps=every_steps), folder, {}),
    ).run(method, batches())


@pytest.mark.parametrize(
    ("tracker", "place", "file"),
    [
        ("jsonl", "callback 'metrics', on_step_end", "metrics.jsonl"),
        ("tensorboard", "callback 'metrics', on_step_end", "tensorboard"),
        ("validation", "callback 'validation', on_step_end", "validation/.iteration-000032."),
    ],
)
def test_a_full_disk_is_one_line_with_a_status_of_its_own(
    small_disk, capfd, caplog, tracker, place, file
):
    def command() -> int:
        train(small_disk, tracker, fill)
        return 0

    assert run_command(command, interrupted=str) == EXIT_STORAGE
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("StorageError: iteration ")
    assert f"{place}: [Errno 28] No space left on device: '{small_disk}/{file}" in line
    newest = find_newest_checkpoint(small_disk)
    assert newest is not None
    assert newest.name == "checkpoint-000030"
    assert inspect(newest, checksums=True).damage is None
    (small_disk / "filler").unlink()
    train(small_disk, tracker, lambda run: None)  # goes on from there
    assert (small_disk / "checkpoint-000060").is_dir()


def test_a_save_on_a_full_disk_has_that_status_too(small_disk, capfd):
    def command() -> int:
        train(small_disk, "none", fill, every_steps=31)
        return 0

    DistillTrainer(training(small_disk, 1), checkpointer=None).run(alternating(1), batches())
    assert run_command(command, interrupted=str) == EXIT_STORAGE
    assert "No space left on device" in capfd.readouterr().err


def test_a_folder_in_the_way_and_one_that_is_gone(tmp_path, capfd):
    with pytest.raises(StorageError, match=r"iteration 32, callback 'validation'.*validation'"):
        train(tmp_path / "a", "validation", no_folder)
    assert find_newest_checkpoint(tmp_path / "a") == tmp_path / "a" / "checkpoint-000030"
    with pytest.raises(StorageError, match="deleted or replaced by another"):
        train(tmp_path / "b", "jsonl", remove)


def test_trackers_that_cannot_be_closed_hide_no_other_error(tmp_path):
    class Unclosable(MemoryTracker):
        def close(self) -> None:
            raise OSError(5, "Input/output error")

    def fails(run: RunState) -> None:
        raise CheckpointError("the first error")

    second = MemoryTracker()
    for event, expected in ((fails, "the first error"), (lambda run: None, "Input/output error")):
        with pytest.raises(DistillError, match=expected):
            DistillTrainer(
                training(tmp_path, 2), callbacks=[At(1, event)], trackers=[Unclosable(), second]
            ).run(alternating(), batches())
        assert second.closed


def test_other_errors_keep_their_status(capfd):
    def fails() -> int:
        raise CheckpointError("nothing intact")

    assert run_command(fails, interrupted=str) == EXIT_FAILED
