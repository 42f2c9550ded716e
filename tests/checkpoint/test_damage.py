"""Kills, full disks, damaged files: nothing damaged is loaded, and what was whole stays."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import logging
import math
import os
import pickletools
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from checkpoint.test_resume import find_differences
from distill_checkpoint import (
    CheckpointConfig,
    CheckpointManager,
    StoredCheckpoint,
    claim_output_dir,
    role_problems,
    write_weights_checkpoint,
)
from distill_checkpoint.manifest import inspect
from distill_checkpoint.state_dicts import unpack
from distill_protocols import CheckpointError, DistillError, TensorWeights
from hypothesis import given
from hypothesis import strategies as st
from ranks import CONTEXT
from safetensors.torch import load_file
from tiny_run import Run, Shape, new_run, train_to_the_end

STEPS = [1, 2, 3]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """Write an output folder with checkpoints 1, 2 and 3."""
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


NESTED = "[" * 200_000


def nest_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text(NESTED)


def nest_under_a_key(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text(f'{{"format": "distill-checkpoint", "x": {NESTED}')


def list_for_a_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("[]")


def rewrite_manifest(checkpoint: Path, key: str, value: object) -> None:
    """Change an entry of the manifest and correct its digest, as a person or a program would."""
    path = checkpoint / "manifest.json"
    body = json.loads(path.read_text()) | {key: value}
    del body["digest"]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**body, "digest": digest}))


def infinite_iteration(checkpoint: Path) -> None:
    rewrite_manifest(checkpoint, "iteration", math.inf)


def absurd_iteration(checkpoint: Path) -> None:
    rewrite_manifest(checkpoint, "iteration", 10**30)


def one_key_twice(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text('{"iteration": 7,' + path.read_text().lstrip()[1:])


def in_other_letters(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_bytes(path.read_text().encode("utf-16"))


def a_folder_for_a_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "manifest.json").mkdir()


def files_elsewhere(checkpoint: Path) -> None:
    name = "../checkpoint-000001/rng.json"
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    rewrite_manifest(checkpoint, "files", files | {name: files["rng.json"]})


def negative_iteration(checkpoint: Path) -> None:
    rewrite_manifest(checkpoint, "iteration", -1)


def no_iteration(checkpoint: Path) -> None:
    rewrite_manifest(checkpoint, "iteration", None)


def files_as_a_list(checkpoint: Path) -> None:
    rewrite_manifest(checkpoint, "files", [["rng.json", 3]])


def sizes_as_text(checkpoint: Path) -> None:
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    rewrite_manifest(checkpoint, "files", {name: {**f, "size": "1"} for name, f in files.items()})


def files_without_sizes(checkpoint: Path) -> None:
    rewrite_manifest(checkpoint, "files", {"rng.json": {}})


def metrics_that_are_none(checkpoint: Path) -> None:
    rewrite_manifest(checkpoint, "metrics", {"fd": math.nan})


def of_a_later_release(checkpoint: Path) -> None:
    rewrite_manifest(checkpoint, "version", 99)


DAMAGES = {
    of_a_later_release: "its format is version 99, and this release reads version",
    truncate: "bytes where",
    flip: "its sha256",
    lose_manifest: "no manifest.json",
    lose_file: "rng.json is missing",
    garble_manifest: "its digest",
    slip_in: "is not in its manifest",
    hollow: "no manifest.json",
    nest_manifest: "nested too deeply",
    nest_under_a_key: "nested too deeply",
    list_for_a_manifest: "no JSON object",
    infinite_iteration: "Infinity is no JSON number",
    absurd_iteration: "is no whole number from 0",
    negative_iteration: "-1 is no whole number",
    no_iteration: "None is no whole number",
    one_key_twice: "the key 'iteration' stands twice",
    in_other_letters: "is no UTF-8 text",
    a_folder_for_a_manifest: "no manifest.json",
    files_elsewhere: "rng.json is missing",
    files_as_a_list: "manifest.json is damaged .AttributeError",
    sizes_as_text: "'1' is no whole number",
    files_without_sizes: "manifest.json is damaged .KeyError",
    metrics_that_are_none: "NaN is no JSON number",
}


@pytest.mark.parametrize(
    ("damage", "word"), DAMAGES.items(), ids=lambda d: getattr(d, "__name__", "")
)
def test_latest_skips_damaged_checkpoints_and_logs_it(folder, caplog, damage, word):
    damage(folder / "checkpoint-000003")
    _, iteration = resume(folder)
    assert iteration == 2
    assert "skipped" in caplog.text
    assert "checkpoint-000003" in caplog.text
    assert re.search(word, caplog.text)


@pytest.mark.parametrize(
    ("damage", "word"), DAMAGES.items(), ids=lambda d: getattr(d, "__name__", "")
)
def test_a_damaged_path_is_an_error_and_loads_nothing(folder, damage, word):
    damage(folder / "checkpoint-000003")
    run = new_run(Shape(), seed=1)
    before = copy.deepcopy(run.everything())
    config = CheckpointConfig(resume=str(folder / "checkpoint-000003"))
    with pytest.raises(CheckpointError, match=word):
        CheckpointManager(config, folder, {}).resume(run.state(folder, 0), run.callbacks)
    assert find_differences(run.everything(), before) == []


def test_none_whole_is_an_error_that_names_them_all(folder):
    for iteration, damage in zip(STEPS, (flip, hollow, truncate), strict=True):
        damage(folder / f"checkpoint-00000{iteration}")
    with pytest.raises(CheckpointError) as excinfo:
        resume(folder)
    assert all(f"checkpoint-00000{i}" in str(excinfo.value) for i in STEPS)


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
        inspection = inspect(checkpoint, checksums=True)
    finally:
        path.write_bytes(content)
    # Another white space in the manifest is no damage.
    good = inspect(checkpoint, checksums=True).manifest
    assert inspection.damage or (path.name == "manifest.json" and inspection.manifest == good)


def test_a_nested_loop_or_header_is_one_error_of_whoever_reads_it(folder):
    checkpoint = folder / "checkpoint-000003"
    stored = StoredCheckpoint.open(checkpoint).weights("critic")["transformer"]
    header = NESTED.encode()
    weights_of(checkpoint).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        stored.describe()
    (checkpoint / "loop.json").write_text(NESTED)
    [problem] = role_problems(checkpoint, "critic", ema=False)
    assert problem.path == ("path",)
    assert "nested too deeply" in problem.message


def test_a_state_that_nobody_could_read_again_is_not_saved(folder):
    run, iteration = resume(folder)
    manager = CheckpointManager(CheckpointConfig(), folder, {})
    nested: list = []
    for _ in range(120):
        nested = [nested]
    tally = run.callbacks["tally"]
    for best, reason in ((10**50, "51 digits"), (nested, "nested too deeply")):
        tally.best = best
        with pytest.raises(DistillError, match=reason):
            manager.save(run.state(folder, iteration + 1), run.callbacks)
        assert sorted(path.name for path in folder.iterdir())[-1] == f"checkpoint-00000{STEPS[-1]}"


@pytest.mark.parametrize(
    "edited",
    [{"$tensor": "x"}, {"$scalar": 3}, {"$scalar": ["int64", 10**30]}, {"$tuple": 3},
     {"$dict": [1]}, {"$float": "x"}, {"$counter": [[1]]}],
)  # fmt: skip
def test_a_state_that_somebody_edited_is_one_error(edited):
    with pytest.raises(CheckpointError, match="somebody has edited it"):
        unpack({"a": [edited]}, {})


def test_a_nested_marker_is_written_anew(tmp_path):
    (tmp_path / "run.json").write_text(NESTED)
    claim_output_dir(tmp_path, resume=True).close()
    assert json.loads((tmp_path / "run.json").read_text())["pid"] == os.getpid()


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


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """Mount a small file system; only root may, and not in every container."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("in_background", [False, True])
def test_a_small_disk_that_fills_up(tmp_path, in_background):
    run = new_run(Shape(width=2000))
    with small_disk(tmp_path / "disk", "size=1500k"):  # room for one checkpoint, not for two
        out = tmp_path / "disk" / "out"
        config = CheckpointConfig(every_steps=2, keep_last=1, async_save=in_background)
        with pytest.raises(CheckpointError, match="No space left on device"):
            run.train(out, 6, CheckpointManager(config, out, {}))
        assert [path.name for path in out.iterdir()] == ["checkpoint-000002"]
        again = new_run(Shape(width=2000), seed=1)
        again.callbacks["ema"].on_train_start(again.state(out, 0))
        manager = CheckpointManager(CheckpointConfig(resume="latest"), out, {})
        assert manager.resume(again.state(out, 0), again.callbacks) == 2
        # A migration has no more room either, and leaves nothing.
        source = TensorWeights("x", {"w": torch.ones(300_000)})
        with pytest.raises(CheckpointError, match="No space left on device"):
            write_weights_checkpoint(
                out / "checkpoint-000009", iteration=9, roles={("a", "b"): source}, config={},
                origin="x",
            )  # fmt: skip
        assert [path.name for path in out.iterdir()] == ["checkpoint-000002"]


def test_a_read_only_disk_can_be_read_from_and_not_saved_to(tmp_path, pristine):
    disk = tmp_path / "disk"
    with small_disk(disk, "size=9m"):
        shutil.copytree(pristine, disk / "out")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        source = StoredCheckpoint.open(disk / "out" / "checkpoint-000003").weights("critic")
        assert source["transformer"].read(["0.weight"])
        del source  # what is read keeps its manifest open, and so its disk mounted
        run, iteration = resume(disk / "out")
        assert iteration == 3
        manager = CheckpointManager(CheckpointConfig(), disk / "out", {})
        with pytest.raises(CheckpointError, match=r"could not be saved: .*Read-only file system"):
            manager.save(run.state(disk, 4), run.callbacks)


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


def test_kills_at_any_moment_leave_whole_checkpoints_and_the_same_end(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("disk")
    steps, width = 12, 4000
    draws = random.Random(0)

    def start(folder: Path, in_background: bool = False, last_sync: int = 0) -> BaseProcess:
        child = CONTEXT.Process(
            target=train_to_the_end, args=(str(folder), steps, width, in_background, last_sync)
        )
        child.start()
        return child

    undisturbed = start(tmp_path / "whole")
    undisturbed.join(120)
    folder = tmp_path / "killed"
    for kill in range(8):
        # Four surely within one of its first saves, then four anywhere.
        within = kill < 4
        child = start(folder, kill % 2 > 0, draws.randrange(1, 90) if within else 0)
        if not within:
            time.sleep(draws.uniform(0, 0.5))
            child.kill()
        child.join(120)
        assert not within or child.exitcode == -signal.SIGKILL
        for path in folder.glob("checkpoint-*"):
            assert inspect(path, checksums=True).damage is None
    last = start(folder)
    last.join(120)
    assert (undisturbed.exitcode, last.exitcode) == (0, 0)
    ends = [read_files(out / f"checkpoint-{steps:06d}") for out in (tmp_path / "whole", folder)]
    assert ends[0].keys() == ends[1].keys()
    assert [name for name in ends[0] if ends[0][name] != ends[1][name]] == []
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def read_files(checkpoint: Path) -> dict[str, str | dict[str, bytes]]:
    """Read every file; safetensors as tensors, since the order of their header is free."""
    assert inspect(checkpoint, checksums=True).damage is None
    return {
        path.relative_to(checkpoint).as_posix(): path.read_text()
        if path.suffix == ".json"
        else {name: value.numpy().tobytes() for name, value in load_file(path).items()}
        for path in checkpoint.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.fixture(autouse=True)
def _words(caplog):
    caplog.set_level(logging.INFO)
