"""Weights out of checkpoints, and checkpoints that a migration writes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from distill_checkpoint import (
    CheckpointConfig,
    CheckpointManager,
    StoredCheckpoint,
    hold_checkpoint,
    is_checkpoint_folder,
    list_checkpoints,
    write_weights_checkpoint,
)
from distill_checkpoint.manifest import inspect
from distill_protocols import CheckpointError, TensorInfo, TensorWeights
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_run import Run, Shape, new_run
from torch import Tensor

EXPERTS = ("transformer", "transformer_2")


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("saved")
    run = new_run(Shape())
    run.train(folder, 4, CheckpointManager(CheckpointConfig(), folder, {"seed": 7}))
    return folder / "checkpoint-000004", run


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / saved[0].name))


def test_an_opened_checkpoint_lists_its_roles_and_averages(saved):
    stored = StoredCheckpoint.open(saved[0])
    assert (stored.iteration, stored.config, stored.origin) == (4, {"seed": 7}, None)
    assert stored.roles == {"student": EXPERTS, "critic": ("transformer",)}
    assert stored.averaged == {"student": EXPERTS}


@pytest.mark.parametrize("ema", [False, True])
def test_weights_are_those_of_the_run(saved, ema):
    role = saved[1].method.bundle["student"]
    sources = StoredCheckpoint.open(saved[0]).weights("student", ema=ema)
    assert list(sources) == list(EXPERTS)
    for key, source in sources.items():
        expected = role.ema[key].weights() if ema else role.moving_state(key)
        assert source.describe() == TensorWeights("", expected).describe()
        assert same(source.read(source.describe()), {n: v.detach() for n, v in expected.items()})
        assert list(source.read(["4.bias", "1.num_batches_tracked"])) == [
            "4.bias", "1.num_batches_tracked",
        ]  # fmt: skip


def test_opening_and_listing_read_no_numbers(saved, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("tensors were read")

    monkeypatch.setattr("distill_checkpoint.tensors.StoredTensors.read_into", refuse)
    assert StoredCheckpoint.open(saved[0]).weights("critic")["transformer"].describe()


@pytest.mark.parametrize(
    ("role", "ema", "message"),
    [
        ("studnet", False, r"no role 'studnet' \(roles: student, critic\)"),
        ("teacher", False, r"no role 'teacher' .* a frozen one is what its own path"),
        ("critic", True, r"no EMA of 'critic', transformer \(EMA of: student\)"),
    ],
)
def test_an_unknown_role_is_named_with_the_known_ones(saved, role, ema, message):
    with pytest.raises(CheckpointError, match=message):
        StoredCheckpoint.open(saved[0]).weights(role, ema=ema)


def test_an_unknown_name_is_an_error(saved):
    source = StoredCheckpoint.open(saved[0]).weights("critic")["transformer"]
    with pytest.raises(CheckpointError, match=r"has no 0\.weigth \(1 of 2 names\)"):
        source.read(["0.weight", "0.weigth"])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_damage_is_reported_where_it_is_read(checkpoint):
    path = next((checkpoint / "roles" / "critic").rglob("*.safetensors"))
    flip(path)
    stored = StoredCheckpoint.open(checkpoint)
    student = stored.weights("student", ema=True)["transformer"]
    assert student.read(student.describe())
    critic = stored.weights("critic")["transformer"]
    with pytest.raises(CheckpointError, match=f"{path.name} is damaged"):
        critic.read(["0.weight"])


@pytest.mark.parametrize("name", ["loop.json", "config.json", "ema/student.transformer.json"])
def test_damaged_json_is_found(checkpoint, name):
    flip(checkpoint / name)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        StoredCheckpoint.open(checkpoint).weights("student", ema=True)


def test_a_folder_that_is_no_whole_checkpoint(checkpoint, tmp_path):
    (checkpoint / "loader.json").unlink()
    with pytest.raises(CheckpointError, match=r"loader\.json is missing"):
        StoredCheckpoint.open(checkpoint)
    with pytest.raises(CheckpointError, match="not an intact checkpoint: it has no manifest"):
        StoredCheckpoint.open(tmp_path)


def test_which_folders_are_checkpoints(checkpoint, tmp_path):
    assert is_checkpoint_folder(checkpoint)
    assert not is_checkpoint_folder(tmp_path)
    assert not is_checkpoint_folder(tmp_path / "absent")
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    assert not is_checkpoint_folder(tmp_path)
    (checkpoint / "manifest.json").unlink()  # damaged, but still recognised as a checkpoint
    assert is_checkpoint_folder(str(checkpoint))


# -- what a migration writes ---------------------------------------------------------------------


class Lazy:
    """A source that counts what is in memory at once."""

    where = "a .pt of long ago"

    def __init__(self, tensors: Mapping[str, Tensor], fails_at: str | None = None) -> None:
        self.tensors = tensors
        self.fails_at = fails_at
        self.asked: list[int] = []

    def describe(self):
        return TensorWeights("", self.tensors).describe()

    def read(self, names):
        names = list(names)
        if self.fails_at in names:
            raise OSError(5, "Input/output error")
        self.asked.append(len(names))
        return {name: self.tensors[name] for name in names}


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
tensors = st.builds(
    lambda shape, dtype: torch.rand(shape).mul(9).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    dtypes,
)
states = st.dictionaries(st.text(st.sampled_from("ab./$é"), min_size=1, max_size=4), tensors)


@given(states, states, st.integers(1, 40))
def test_migrated_weights_come_back(student, critic, shard_bytes):
    with TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint-000012"
        sources = {("student", "a"): Lazy(student), ("critic.x", "b"): Lazy(critic)}
        write_weights_checkpoint(
            folder, iteration=12, roles=sources, ema={("student", "a"): Lazy(student)},
            moments={("student", "a"): Lazy(critic)}, config={"a": 1}, origin="legacy",
            shard_bytes=shard_bytes,
        )  # fmt: skip
        assert all(set(source.asked) <= {1} for source in sources.values())
        assert inspect(folder, checksums=True).damage is None
        stored = StoredCheckpoint.open(folder)
        assert (stored.iteration, stored.origin, stored.config) == (12, "legacy", {"a": 1})
        assert stored.roles == {"student": ("a",), "critic.x": ("b",)}
        for role, key, ema, state in (
            ("student", "a", False, student),
            ("student", "a", True, student),
            ("critic.x", "b", False, critic),
        ):
            source = stored.weights(role, ema=ema)[key]
            assert source.describe() == TensorWeights("", state).describe()
            assert same(source.read(state), state)
            for name, value in state.items():
                if value.ndim:
                    rows = {name: source.read_rows(name, 1, 3)}
                    assert same(rows, {name: value[1:3]})
        # Any tool can read them.
        files = (folder / "roles" / "student").rglob("*.safetensors")
        migrated = [load_file(path) for path in files]
        assert same({n: v for tensors in migrated for n, v in tensors.items()}, student)


def write(folder: Path, source: Lazy) -> None:
    write_weights_checkpoint(
        folder, iteration=0, roles={("student", "a"): source}, config={}, origin="x.pt"
    )


def test_a_run_does_not_resume_from_weights_alone(tmp_path):
    folder = tmp_path / "checkpoint-000003"
    write(folder, Lazy({"w": torch.ones(2)}))
    run = new_run(Shape(ema_roles=()))
    manager = CheckpointManager(CheckpointConfig(resume=str(folder)), tmp_path / "out", {})
    with pytest.raises(CheckpointError, match=r"weights only \(x\.pt\).*init_from"):
        manager.resume(run.state(tmp_path, 0), run.callbacks)


def test_a_migration_that_fails_leaves_nothing(tmp_path):
    source = Lazy({"a": torch.ones(2), "b": torch.ones(3)}, fails_at="b")
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(tmp_path / "checkpoint-000001", source)
    assert list(tmp_path.iterdir()) == []


def test_a_migration_writes_over_nothing(tmp_path):
    (tmp_path / "checkpoint-000001").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        write(tmp_path / "checkpoint-000001", Lazy({}))
    with pytest.raises(CheckpointError, match=r"EMA of student\.a without live weights"):
        write_weights_checkpoint(
            tmp_path / "x", iteration=0, roles={}, ema={("student", "a"): Lazy({})}, config={},
            origin="x.pt",
        )  # fmt: skip


def test_a_source_with_a_wrong_description_is_an_error(tmp_path):
    source = Lazy({"a": torch.ones(2)})
    source.describe = lambda: {"a": TensorInfo((3,), torch.float32)}
    with pytest.raises(
        CheckpointError, match=r"a is \[2\] float32, but its source described \[3\]"
    ):
        write(tmp_path / "checkpoint-000001", source)
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_safetensors_lacks_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no type for torch\.complex64"):
        write(tmp_path / "checkpoint-000001", Lazy({"a": torch.ones(2, dtype=torch.complex64)}))


def test_a_run_does_not_delete_a_checkpoint_in_use(tmp_path, caplog):
    caplog.set_level("INFO")
    run = new_run(Shape(ema_roles=()))
    manager = CheckpointManager(CheckpointConfig(keep_last=1), tmp_path, {})
    manager.save(run.state(tmp_path, 1), run.callbacks)
    sources = StoredCheckpoint.open(tmp_path / "checkpoint-000001").weights("student")
    manager.save(run.state(tmp_path, 2), run.callbacks)
    assert list(list_checkpoints(tmp_path)) == [2, 1]
    assert "checkpoint-000001 stays for now: another process reads it" in caplog.text
    source = sources["transformer"]
    assert source.read(source.describe())
    del source, sources
    manager.save(run.state(tmp_path, 3), run.callbacks)
    assert list(list_checkpoints(tmp_path)) == [3]


def test_a_file_deleted_meanwhile_is_an_error(tmp_path):
    """By hand, or by a run of an older version."""
    run = new_run(Shape(ema_roles=()))
    CheckpointManager(CheckpointConfig(), tmp_path, {}).save(run.state(tmp_path, 1), run.callbacks)
    folder = tmp_path / "checkpoint-000001"
    source = StoredCheckpoint.open(folder).weights("student")["transformer"]
    (name, *_) = source.describe()
    fresh = StoredCheckpoint.open(folder).weights("student")["transformer"]
    shutil.rmtree(folder)
    for reader in (source, fresh):
        with pytest.raises(CheckpointError, match=r"deleted|not an intact checkpoint|has no"):
            reader.read([name])
    assert hold_checkpoint(folder) is None


def test_a_pipe_in_place_of_a_manifest_is_no_checkpoint(checkpoint):
    (checkpoint / "manifest.json").unlink()
    os.mkfifo(checkpoint / "manifest.json")
    signal.alarm(60)  # whoever opens it waits for ever
    try:
        assert hold_checkpoint(checkpoint) is None
        with pytest.raises(CheckpointError):
            StoredCheckpoint.open(checkpoint)
    finally:
        signal.alarm(0)


def test_a_ctrl_c_while_weights_are_read_stays_one(saved, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distill_checkpoint.tensors._Reader.read_data", interrupt)
    weights = StoredCheckpoint.open(saved[0]).weights("student")["transformer"]
    with pytest.raises(KeyboardInterrupt):
        weights.read([next(iter(weights.describe()))])
