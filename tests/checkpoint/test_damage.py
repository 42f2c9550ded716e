"""Kills, full disks, damaged files: nothing damaged is loaded, and what was whole stays."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import pickletools
import random
import shutil
import time
from pathlib import Path

import pytest
from distill_checkpoint import CheckpointConfig, CheckpointManager
from distill_checkpoint.manifest import inspect
from distill_protocols import CheckpointError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_run import Run, Shape, new_run, train_to_the_end

STEPS = [1, 2, 3]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """An output folder with checkpoints 1, 2, 3."""
    folder = tmp_path_factory.mktemp("pristine")
    config = CheckpointConfig(every_steps=1, keep_last=3)
    new_run(Shape()).train(folder, 3, CheckpointManager(config, folder, {}))
    return folder


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def resume(folder: Path, source: str = "latest") -> tuple[Run, int]:
    run = new_run(Shape(), seed=1)
    run.callbacks["ema"].on_train_start(run.state(folder, 0))
    manager = CheckpointManager(CheckpointConfig(resume=source), folder, {})
    return run, manager.resume(run.state(folder, 0), run.callbacks)


def weights_of(checkpoint: Path) -> Path:
    return next((checkpoint / "roles" / "critic").rglob("*.safetensors"))


def truncate(checkpoint: Path) -> None:
    path = weights_of(checkpoint)
    path.write_bytes(path.read_bytes()[:-7])


def flip(checkpoint: Path) -> None:
    path = weights_of(checkpoint)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def lose_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def lose_file(checkpoint: Path) -> None:
    (checkpoint / "rng.json").unlink()


def garble_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"iteration": 3', '"iteration": 4'))


def slip_in(checkpoint: Path) -> None:
    path = weights_of(checkpoint)
    shutil.copy(path, path.with_name("shard-00002-model-00001-of-00001.safetensors"))


def hollow(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGES = {
    truncate: "bytes where",
    flip: "its sha256",
    lose_manifest: "no manifest.json",
    lose_file: "rng.json is missing",
    garble_manifest: "its digest",
    slip_in: "is not in its manifest",
    hollow: "no manifest.json",
}


@pytest.mark.parametrize(
    ("damage", "word"), DAMAGES.items(), ids=lambda d: getattr(d, "__name__", "")
)
def test_latest_skips_the_damaged_with_a_word(folder, caplog, damage, word):
    damage(folder / "checkpoint-000003")
    _, iteration = resume(folder)
    assert iteration == 2
    assert "skipped" in caplog.text
    assert "checkpoint-000003" in caplog.text
    assert word in caplog.text


@pytest.mark.parametrize(
    ("damage", "word"), DAMAGES.items(), ids=lambda d: getattr(d, "__name__", "")
)
def test_a_damaged_path_is_an_error_and_loads_nothing(folder, damage, word):
    damage(folder / "checkpoint-000003")
    run = new_run(Shape(), seed=1)
    before = str(run.everything())
    config = CheckpointConfig(resume=str(folder / "checkpoint-000003"))
    with pytest.raises(CheckpointError, match=word):
        CheckpointManager(config, folder, {}).resume(run.state(folder, 0), run.callbacks)
    assert str(run.everything()) == before


def test_none_whole_is_an_error_that_names_them_all(folder):
    for iteration, damage in zip(STEPS, (flip, hollow, truncate), strict=True):
        damage(folder / f"checkpoint-00000{iteration}")
    with pytest.raises(CheckpointError) as caught:
        resume(folder)
    assert all(f"checkpoint-00000{i}" in str(caught.value) for i in STEPS)


def test_a_path_that_is_not_there_is_an_error(folder):
    with pytest.raises(CheckpointError, match="no manifest"):
        resume(folder, str(folder / "checkpoint-000009"))


def test_a_renamed_checkpoint_is_not_the_latest(folder, caplog):
    (folder / "checkpoint-000001").rename(folder / "checkpoint-000009")
    assert resume(folder)[1] == 3
    assert "renamed" in caplog.text


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_by_again(folder):
    flip(folder / "checkpoint-000003")
    run = new_run(Shape(), seed=1)
    run.train(folder, 3, CheckpointManager(CheckpointConfig(resume="latest"), folder, {}))
    assert inspect(folder / "checkpoint-000003", checksums=True).damage is None
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@given(st.data())
def test_any_flipped_byte_in_any_file_is_found(pristine, data):
    checkpoint = pristine / "checkpoint-000001"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files), label="file")
    content = path.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1), label="byte")
    bad = bytearray(content)
    bad[place] ^= data.draw(st.integers(1, 255), label="flip")
    path.write_bytes(bad)
    try:
        found = inspect(checkpoint, checksums=True)
    finally:
        path.write_bytes(content)
    # Another white space in the manifest is no damage.
    good = inspect(checkpoint, checksums=True).manifest
    assert found.damage or (path.name == "manifest.json" and found.manifest == good)


def test_there_is_no_pickle_in_a_checkpoint(pristine):
    files = [path for path in pristine.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        content = path.read_bytes()
        assert content[:2] != b"PK"  # torch.save's zip
        with pytest.raises(Exception, match=r".*"):
            list(pickletools.genops(content))


@pytest.mark.parametrize("fails_at", [1, 5, 20, 40])
def test_a_full_disk_is_an_error_and_leaves_the_others_whole(folder, monkeypatch, fails_at):
    # Simulated: this test may run as root in a container that may not mount a small tmpfs.
    calls = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    run, iteration = resume(folder)
    monkeypatch.setattr(os, "fsync", fsync)
    manager = CheckpointManager(CheckpointConfig(keep_last=1), folder, {})
    with pytest.raises(CheckpointError, match="No space left on device"):
        manager.save(run.state(folder, iteration + 1), run.callbacks)
    monkeypatch.undo()
    assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint-00000{i}" for i in STEPS]
    assert resume(folder)[1] == 3


def test_a_really_full_disk(tmp_path, monkeypatch):
    # /dev/full answers every write with ENOSPC; the staging folder's first file lands on it.
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this platform")
    run = new_run(Shape())
    real = Path.mkdir

    def mkdir(path: Path, *args, **kwargs) -> None:
        real(path, *args, **kwargs)
        if path.name.startswith(".staging-"):
            (path / "loop.json").symlink_to("/dev/full")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    manager = CheckpointManager(CheckpointConfig(), tmp_path, {})
    with pytest.raises(CheckpointError, match="could not be saved"):
        manager.save(run.state(tmp_path, 1), run.callbacks)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    # Below a file, as permissions do not bind root.
    (tmp_path / "file").write_text("")
    run = new_run(Shape())
    manager = CheckpointManager(CheckpointConfig(), tmp_path / "file" / "out", {})
    with pytest.raises(CheckpointError, match="could not be saved"):
        manager.save(run.state(tmp_path, 1), run.callbacks)


def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(folder):
    (folder / "checkpoint-000003").rename(folder / ".replaced-checkpoint-000003")
    (folder / ".staging-checkpoint-000003").mkdir()
    assert resume(folder)[1] == 3
    assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint-00000{i}" for i in STEPS]


def test_kills_at_any_moment_leave_whole_checkpoints_and_the_same_end(tmp_path, monkeypatch):
    steps, width = 12, 4000
    # Where forked children find tiny_run: imported once, in the server that they are forked from.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent), prepend=os.pathsep)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_run", "torch._dynamo"])
    draws = random.Random(0)

    def start(folder: Path) -> multiprocessing.process.BaseProcess:
        child = context.Process(target=train_to_the_end, args=(str(folder), steps, width))
        child.start()
        return child

    undisturbed = start(tmp_path / "whole")
    undisturbed.join(120)
    folder = tmp_path / "killed"
    kills = kills_in_a_save = 0
    while kills < 6:
        child = start(folder)
        if kills % 2:  # every other one surely within a save, the rest anywhere
            wait_for_a_save(child, folder)
        time.sleep(draws.uniform(0, 0.05 if kills % 2 else 0.5))
        if not child.is_alive():
            break
        child.kill()
        child.join()
        kills += 1
        kills_in_a_save += any(folder.glob(".staging-*"))
        for path in folder.glob("checkpoint-*"):
            assert inspect(path, checksums=True).damage is None
    assert kills_in_a_save >= 2
    last = start(folder)
    last.join(120)
    assert (undisturbed.exitcode, last.exitcode) == (0, 0)
    ends = [contents(out / f"checkpoint-{steps:06d}") for out in (tmp_path / "whole", folder)]
    assert ends[0].keys() == ends[1].keys()
    assert [name for name in ends[0] if ends[0][name] != ends[1][name]] == []
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def contents(checkpoint: Path) -> dict[str, str | dict[str, bytes]]:
    """Every file; of safetensors their tensors, as they order their header as they like."""
    assert inspect(checkpoint, checksums=True).damage is None
    return {
        path.relative_to(checkpoint).as_posix(): path.read_text()
        if path.suffix == ".json"
        else {name: value.numpy().tobytes() for name, value in load_file(path).items()}
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def wait_for_a_save(child: multiprocessing.process.BaseProcess, folder: Path) -> None:
    while child.is_alive() and not any(folder.glob(".staging-*")):
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def _words(caplog):
    caplog.set_level(logging.INFO)
