"""Config rules, values, tensors, retention, output folders, export: the parts by themselves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from distill_checkpoint import (
    ChangesConfig,
    CheckpointConfig,
    CheckpointManager,
    ExportCallback,
    ExportConfig,
    KeepBestConfig,
    claim_output_dir,
    state_dicts,
)
from distill_checkpoint.manifest import as_file_name, inspect
from distill_checkpoint.output_folder import find_superseded, list_checkpoints
from distill_checkpoint.state_dicts import pack, unpack
from distill_checkpoint.tensors import read_tensors, write_tensors
from distill_protocols import (
    CapabilityError,
    ExportRequest,
    OutputError,
    RoleError,
    RoleSpec,
    SamplerSpec,
    TensorInfo,
)
from distill_runtime import FileInfo, sha256_of_file
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_run import Shape, new_run
from torch import nn

# -- config -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"every_steps": 0}, "0 must be at least 1"),
        ({"keep_last": 0}, "nothing to resume from"),
        ({"every_steps": None, "keep_every": 10}, "no effect without every_steps"),
        ({"every_steps": 4, "keep_every": 10}, "multiple of every_steps"),
        ({"resume": "checkpoint-000400"}, "absolute path"),
        ({"resume": "Latest"}, "'latest', 'none'"),
        ({"timeout_seconds": 0.0}, "0 must be above 0"),
        (
            {"every_steps": None, "keep_best": KeepBestConfig(metric="fd")},
            "no effect without every_steps",
        ),
    ],
)
def test_config_problems(keys, message):
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**keys)


@pytest.mark.parametrize(
    "folder",
    [
        "", ".", "/x", "../x", "a/../../x", ".hidden", "checkpoint-1",
        "validation", "tensorboard/student", "./run.json", "metrics.jsonl", "wandb",
    ],
)  # fmt: skip
def test_export_stays_in_the_output_folder_and_off_the_checkpoints(folder):
    with pytest.raises(ValueError, match="for example 'export/student'"):
        ExportConfig(role="student", folder=folder)


def test_two_exports_into_one_folder():
    exports = [ExportConfig(role=role, folder="a/b") for role in ("student", "critic")]
    with pytest.raises(ValueError, match="a/b is the folder of two exports"):
        CheckpointConfig(export=tuple(exports))


@pytest.mark.parametrize("entry", ["critic", "roles.", "role.critic", "schedulers.student", ""])
def test_changes_name_what_a_run_can_gain_or_lose(entry):
    with pytest.raises(ValueError, match=r"must be one of roles\.<name>, optimizers\.<name>, ema"):
        ChangesConfig(added=(entry,))


def test_a_state_listed_twice_in_changes_is_refused():
    with pytest.raises(ValueError, match=r"roles\.a is listed twice"):
        ChangesConfig(dropped=("roles.a", "roles.a"))


# -- values and tensors ---------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
tensors = st.builds(
    lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
)
leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | tensors
    | st.builds(Counter, st.lists(st.integers(0, 9), max_size=3))
)  # fmt: skip
names = st.text(st.sampled_from("a/.$#"), max_size=8) | st.just("$tensor")
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(names | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@given(trees)
@example({"step": torch.tensor(7.0, dtype=torch.float64), "betas": (0.0, math.inf), "$float": 1})
@example({"a/b": torch.ones(2), "a": {"b": torch.zeros(2)}, 3: Counter([1, 1])})
def test_state_comes_back_as_it_was(tree):
    packed, unpacked = pack(tree, "test")
    with TemporaryDirectory() as name:
        write_tensors(Path(name, "t"), unpacked)
        back = unpack(
            json.loads(json.dumps(packed, allow_nan=False)), read_tensors(Path(name, "t"))
        )
    assert same(tree, back)


@given(st.lists(st.integers(0, 20), max_size=6), st.integers(1, 100))
def test_tensors_spread_over_files_come_back(sizes, shard_bytes):
    tensors = {f"t{i}": torch.rand(size) for i, size in enumerate(sizes)}
    with TemporaryDirectory() as name:
        write_tensors(Path(name, "t"), tensors, shard_bytes=shard_bytes)
        data = [4 * size for size in sizes]
        files = list(Path(name, "t").glob("*.safetensors"))
        assert same(tensors, read_tensors(Path(name, "t")))
    assert len(files) >= sum(data) / (shard_bytes + max(data, default=0))


def test_checksums_are_those_of_the_files(tmp_path):
    # Larger than what may be written ahead of the hashing.
    tensors = {"small": torch.rand(3), "flag": torch.tensor([True]), "empty": torch.rand(0, 2)}
    tensors |= {f"large{i}": torch.rand(2_000_000) for i in range(10)}
    written = write_tensors(tmp_path / "t", tensors)
    assert written == {
        path: FileInfo(size=path.stat().st_size, sha256=sha256_of_file(path))
        for path in (tmp_path / "t").iterdir()
    }
    assert same(tensors, read_tensors(tmp_path / "t"))


def test_views_of_one_memory_come_back():
    base = torch.rand(4, 6)
    tensors = {"base": base, "row": base[1], "turned": base.t(), "wide": base[:1].expand(3, 6)}
    with TemporaryDirectory() as name:
        write_tensors(Path(name, "t"), tensors)
        assert same(tensors, read_tensors(Path(name, "t")))


awkward = st.text(st.sampled_from("ab./\\%\0 é"), max_size=4) | st.text(max_size=4)


@given(awkward, awkward)
def test_names_are_different_single_file_names(a, b):
    assert (as_file_name(a) == as_file_name(b)) == (a == b)
    assert as_file_name(a) not in ("", ".", "..")
    assert not set(as_file_name(a)) & set("/.\\\0")


# -- retention ------------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.integers(1, 60),
        st.dictionaries(st.sampled_from(["fd", "other"]), st.sampled_from([0.5, 1.0, 2.0])),
        min_size=1,
    ),
    st.integers(1, 5),
    st.none() | st.integers(1, 7),
    st.none()
    | st.builds(
        KeepBestConfig,
        metric=st.just("fd"),
        mode=st.sampled_from(["min", "max"]),
        count=st.integers(1, 3),
    ),
    st.sets(st.integers(0, 30), max_size=2),
)
def test_retention(metrics, keep_last, keep_every, keep_best, kept_until):
    gone = find_superseded(
        metrics, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best,
        kept_until=kept_until,
    )  # fmt: skip
    assert list(gone) == sorted(set(gone))
    candidates = [i for i in metrics if "fd" in metrics[i]]

    def stays(i: int) -> bool:
        def better(j: int) -> bool:
            a, b = metrics[j]["fd"], metrics[i]["fd"]
            return (a < b if keep_best.mode == "min" else a > b) or (a == b and j > i)

        newer = sum(j > i for j in metrics)
        measured = keep_best is not None and i in candidates
        return (
            newer < keep_last
            or (keep_every is not None and i % keep_every == 0)
            or any(i <= h and not any(i < j <= h for j in metrics) for h in kept_until)
            or (
                measured
                and sum("fd" in metrics[j] and better(j) for j in metrics) < keep_best.count
            )
        )

    assert set(metrics) - set(gone) == {i for i in metrics if stays(i)}
    assert max(metrics) not in gone


def test_retention_on_disk_keeps_the_last_whole_one_when_newer_ones_are_damaged(tmp_path):
    config = CheckpointConfig(every_steps=1, keep_last=2, keep_every=3)
    run = new_run(Shape(ema_roles=()))
    run.train(tmp_path, 5, CheckpointManager(config, tmp_path, {}))
    assert list(list_checkpoints(tmp_path)) == [5, 4, 3]
    for iteration in (5, 4):
        (tmp_path / f"checkpoint-00000{iteration}" / "manifest.json").unlink()
    CheckpointManager(config, tmp_path, {}).save(run.state(tmp_path, 6), run.callbacks)
    # Damaged ones neither count among the last two nor are deleted: a person may want to look.
    assert list(list_checkpoints(tmp_path)) == [6, 5, 4, 3]


@pytest.mark.parametrize("best", [None, KeepBestConfig(metric="report/fd")])
def test_retention_does_not_count_later_ones_that_a_resume_passed_over(tmp_path, best):
    config = CheckpointConfig(every_steps=2, keep_last=1, keep_best=best, resume="latest")
    run = new_run(Shape(ema_roles=()))
    keep_all = CheckpointManager(CheckpointConfig(every_steps=2, keep_last=9), tmp_path, {})
    run.train(tmp_path, 4, keep_all)
    flipped = next((tmp_path / "checkpoint-000004").rglob("*.safetensors"))
    content = bytearray(flipped.read_bytes())
    content[-3] ^= 1  # of the right size: only its checksum is wrong
    flipped.write_bytes(content)
    run = new_run(Shape(ema_roles=()))
    run.train(tmp_path, 3, CheckpointManager(config, tmp_path, {}))
    # Counted, the damaged one would be the newest, and what was just saved would go for its sake.
    assert list(list_checkpoints(tmp_path)) == [4, 3]
    assert inspect(tmp_path / "checkpoint-000003", checksums=True).damage is None


def test_a_folder_that_cannot_be_listed_ends_no_run(tmp_path, monkeypatch, caplog):
    def fails(folder: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("distill_checkpoint.manager.list_checkpoints", fails)
    run = new_run(Shape(ema_roles=()))
    # On several ranks only one deletes: raised there, the error would leave the others waiting.
    CheckpointManager(CheckpointConfig(), tmp_path, {}).save(run.state(tmp_path, 1), run.callbacks)
    assert "cannot be listed: [Errno 5] Input/output error" in caplog.text
    assert inspect(tmp_path / "checkpoint-000001", checksums=True).damage is None


def test_the_best_stay(tmp_path, caplog):
    best = KeepBestConfig(metric="report/fd", count=2)
    config = CheckpointConfig(every_steps=1, keep_last=1, keep_best=best)
    values = {1: 3.0, 2: float("nan"), 3: 1.0, 4: torch.tensor(2.0), 5: 4.0}
    run = new_run(Shape(ema_roles=()))

    def measure(state, step) -> None:
        if step.iteration in values:
            state.metrics["report/fd"] = values[step.iteration]

    run.callbacks["tally"].on_step_end = measure
    run.train(tmp_path, 7, CheckpointManager(config, tmp_path, {}))
    assert list(list_checkpoints(tmp_path)) == [7, 4, 3]
    messages = [r.getMessage() for r in caplog.records if "no candidate" in r.getMessage()]
    assert len(messages) == 1
    assert messages[0].startswith("checkpoint-000006 is no candidate for keep_best, as rep")
    assert "grad_norm/" in messages[0]


def test_nothing_is_deleted_before_the_new_one_is_there(tmp_path, monkeypatch):
    config = CheckpointConfig(keep_last=1)
    run = new_run(Shape(ema_roles=()))
    manager = CheckpointManager(config, tmp_path, {})
    manager.save(run.state(tmp_path, 1), run.callbacks)
    seen = []

    def remove(folder: Path) -> None:
        seen.append((folder.name, sorted(list_checkpoints(tmp_path))))

    monkeypatch.setattr("distill_checkpoint.output_folder.remove_folder", remove)
    manager.save(run.state(tmp_path, 2), run.callbacks)
    assert seen == [("checkpoint-000001", [1, 2])]


# -- output folder --------------------------------------------------------------------------------


def test_an_output_folder_is_claimed_once(tmp_path):
    with claim_output_dir(tmp_path / "a" / "b", resume=False) as claim:
        assert (claim.folder / "run.json").exists()
    with pytest.raises(
        OutputError, match=r"\(run.json\), which has left no checkpoint.*latest, and starts afresh"
    ):
        claim_output_dir(claim.folder, resume=False)
    (claim.folder / "checkpoint-000001").mkdir()
    with pytest.raises(OutputError, match=r"holds another run \(run.json\); .*resume: latest\),"):
        claim_output_dir(claim.folder, resume=False)
    with claim_output_dir(claim.folder, resume=True) as again:
        assert again.folder == claim.folder


HOLD = """
import sys, distill_checkpoint
claim = distill_checkpoint.claim_output_dir(sys.argv[1], resume=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_locked_by_a_living_process_and_freed_by_a_killed_one(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        assert other.stdout.readline() == b"held\n"
        for resume in (True, False):
            with pytest.raises(OutputError, match=f"is running there .pid {other.pid} on "):
                claim_output_dir(tmp_path, resume=resume)
        other.kill()
    # It crashed before its first checkpoint: its folder must not be lost for that.
    with claim_output_dir(tmp_path, resume=True):
        assert json.loads((tmp_path / "run.json").read_text())["pid"] == os.getpid()


def test_only_the_owner_of_a_marker_removes_it(tmp_path):
    first = claim_output_dir(tmp_path / "a", resume=False)
    first.close()
    claim_output_dir(tmp_path / "a", resume=True).release()
    assert (tmp_path / "a" / "run.json").exists()
    first.release()  # closed: by now it may be another's
    assert (tmp_path / "a" / "run.json").exists()

    claim_output_dir(tmp_path / "b", resume=True).release()
    assert not (tmp_path / "b").exists()


def test_a_claim_ends_with_its_holder(tmp_path):
    def hold() -> None:
        claim = claim_output_dir(tmp_path, resume=False)  # noqa: F841

    hold()
    claim_output_dir(tmp_path, resume=True).close()


def test_checkpoints_without_a_marker_are_another_run_too(tmp_path):
    (tmp_path / "checkpoint-000004").mkdir()
    with pytest.raises(OutputError, match="checkpoint-000004"):
        claim_output_dir(tmp_path, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000004"]


@pytest.mark.parametrize("below", ["file", "file/a/b"])
def test_a_folder_that_cannot_be_made(tmp_path, below):
    # Below a file, as permissions do not bind root.
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="cannot be used as output folder"):
        claim_output_dir(tmp_path / below, resume=False)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_full_disk_leaves_no_folder_behind(tmp_path, monkeypatch):
    def dump(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distill_checkpoint.output_folder.json.dump", dump)
    with pytest.raises(OutputError, match="No space left"):
        claim_output_dir(tmp_path / "a" / "b", resume=False)
    assert list(tmp_path.iterdir()) == []


# -- export ---------------------------------------------------------------------------------------


class Exporter:
    """Notes what it is asked for; ``verify`` notes that it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[RoleSpec, Path, ExportRequest]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.verified: list[Path] = []

    def export(self, role, weights, folder, request):
        self.calls.append((role, folder, request))
        source = weights["transformer"]
        self.weights.append({n: v.clone() for n, v in source.read(source.describe()).items()})
        return {"notes": []}

    def verify(self, role, weights, folder, request):
        self.verified.append(folder)
        return {"notes": ["all equal"]}


ROLES = {
    name: RoleSpec(name=name, path=f"/models/{name}", trainable=True)
    for name in ("student", "critic", "studnet")
}


def export_callback(exports, exporter, folder) -> ExportCallback:
    return ExportCallback(exports, exporter, ROLES, folder)


def export_run(tmp_path, exports, steps=3, stop_at=None):
    run, exporter = new_run(Shape()), Exporter()
    run.callbacks["export"] = export_callback(exports, exporter, tmp_path)
    if stop_at:
        run.callbacks["tally"].on_step_start = lambda state: (
            state.request_stop("asked to") if state.iteration == stop_at else None
        )
    run.train(tmp_path, steps)
    return run, exporter


def test_export_at_the_end(tmp_path):
    exports = [
        ExportConfig(role="student", folder="export/live", format="comfyui", precision="bf16"),
        ExportConfig(role="student", folder="export/ema", ema=True, verify=True),
    ]
    run, exporter = export_run(tmp_path, exports)
    spec = SamplerSpec(steps=2)
    live = ExportRequest(sampler=spec, weights="live", format="comfyui", precision="bf16")
    assert exporter.calls == [
        (ROLES["student"], tmp_path / "export" / "live", live),
        (ROLES["student"], tmp_path / "export" / "ema", ExportRequest(sampler=spec, weights="ema")),
    ]
    assert exporter.verified == [tmp_path / "export" / "ema"]
    role = run.method.bundle["student"]
    expected = [role.modules["transformer"].state_dict(), role.ema["transformer"].weights()]
    for actual, weights in zip(exporter.weights, expected, strict=True):
        assert actual.keys() == weights.keys()
        assert all(torch.equal(actual[name], weights[name]) for name in actual)


def test_a_stopped_run_exports_nothing_and_says_so(tmp_path, caplog):
    exports = [ExportConfig(role="student", folder="x")]
    assert export_run(tmp_path, exports, stop_at=2)[1].calls == []
    assert "nothing exported: the run stopped at iteration 2 of 3 (asked to)" in caplog.text
    assert len(export_run(tmp_path, exports, stop_at=3)[1].calls) == 1


@pytest.mark.parametrize(
    ("export", "error", "message"),
    [
        (ExportConfig(role="studnet", folder="x"), RoleError, "studnet"),
        (ExportConfig(role="critic", folder="x", ema=True), RoleError, "which keeps none"),
    ],
)
def test_an_export_that_cannot_work_is_refused_in_the_first_step(tmp_path, export, error, message):
    run = new_run(Shape())
    run.callbacks["export"] = export_callback([export], Exporter(), tmp_path)
    with pytest.raises(error, match=message):
        run.train(tmp_path, 3)
    assert sum(run.method.update_counts.values()) == 0


def test_an_export_needs_to_know_how_to_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_run.TinyMethod.sampler_spec", None)
    with pytest.raises(CapabilityError, match="no sampler_spec"):
        export_run(tmp_path, [ExportConfig(role="student", folder="x")])


def test_a_failing_export_is_raised(tmp_path):
    class Failing(Exporter):
        def export(self, role, weights, folder, request):
            raise OutputError("no room")

    run = new_run(Shape())
    exports = [ExportConfig(role="student", folder="x")]
    run.callbacks["export"] = export_callback(exports, Failing(), tmp_path)
    with pytest.raises(OutputError, match="no room"):
        run.train(tmp_path, 1)


def test_a_state_saved_on_a_cpu_is_loaded_to_where_the_weights_are():
    """Moments of another type too: bf16 weights have fp32 ones. (The device is "meta".)"""
    net = nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3).bfloat16()).sum().backward()
    optimizer.step()
    for moments in optimizer.state.values():
        moments |= {key: moments[key].float() for key in ("exp_avg", "exp_avg_sq")}
    state = state_dicts.optimizer_state(optimizer, dict(net.named_parameters()), "net")
    packed, tensors = state_dicts.pack(state, "net")
    elsewhere = nn.Linear(3, 2, device="meta").bfloat16()
    theirs = torch.optim.AdamW(elsewhere.parameters())
    asked = {}

    infos = {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}
    stored = SimpleNamespace(infos=infos, read_into=asked.update)
    parameters = dict(elsewhere.named_parameters())
    state_dicts.load_optimizer_state(theirs, parameters, packed, stored, "net")
    of_weights = {n: t for n, t in asked.items() if "exp_avg" in n}
    assert len(of_weights) == 4
    assert {t.device.type for t in of_weights.values()} == {"meta"}
    for moments in theirs.state.values():
        assert {moments[k].device.type for k in ("exp_avg", "exp_avg_sq")} == {"meta"}
        assert {moments[k].dtype for k in ("exp_avg", "exp_avg_sq")} == {torch.float32}
