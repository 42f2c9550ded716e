"""Every path that reads a user's file refuses one that would run code. (A model's folder: in
``adapters_wan``; other frameworks' checkpoints: in ``checkpoint``.)
"""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from distill_checkpoint import CheckpointConfig, CheckpointManager, StoredCheckpoint
from distill_conditioning import DataConfig, LatentDataset, ShardWriter
from distill_evaluation import ClipJudge, Judge, JudgeConfig
from distill_evaluation.shipped_metrics.configs import I3D_SHA256
from distill_evaluation.shipped_metrics.frechet import load_network, read_reference
from distill_evaluation.shipped_metrics.i3d import load_pinned_program
from distill_protocols import CheckpointError, Condition, DataError, WeightsError
from distill_runfile.source import read_source
from foreign_files import Evil
from tiny_run import Shape, new_run

WORKSPACE = Path(__file__).parent.parent


@pytest.fixture
def evil(tmp_path) -> Evil:
    evil = Evil(tmp_path / "marker")
    evil.assert_runs_code()
    return evil


def zipped(evil: Evil, file: Path) -> None:
    torch.save({"weight": evil}, file)


def old(evil: Evil, file: Path) -> None:
    torch.save({"weight": evil}, file, _use_new_zipfile_serialization=False)


def bare(evil: Evil, file: Path) -> None:
    file.write_bytes(pickle.dumps(evil))


@pytest.fixture(params=[zipped, old, bare], ids=lambda write: write.__name__)
def plant(request, evil):
    """Put a pickle in the place of a file."""
    return lambda file: request.param(evil, file)


# -- a checkpoint to resume from ------------------------------------------------------------------


def sign(checkpoint: Path) -> None:
    """Correct sizes and checksums after ``plant``, as an attacker who knows the format would."""
    file = checkpoint / "manifest.json"
    body = json.loads(file.read_text())
    del body["digest"]
    for name, entry in body["files"].items():
        content = (checkpoint / name).read_bytes()
        entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps({**body, "digest": digest}))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", ["roles", "ema", "optimizers", "rng"])
def test_resume(tmp_path, evil, plant, kind, signed):
    folder = tmp_path / "out"
    new_run(Shape()).train(
        folder, 1, CheckpointManager(CheckpointConfig(every_steps=1), folder, {})
    )
    checkpoint = folder / "checkpoint-000001"
    file = next((checkpoint / kind).rglob("*.safetensors"), None) or checkpoint / f"{kind}.json"
    plant(file)
    if signed:
        sign(checkpoint)
    run = new_run(Shape(), seed=1)
    run.callbacks["ema"].on_train_start(run.state(folder, 0))
    manager = CheckpointManager(CheckpointConfig(resume=str(checkpoint)), folder, {})
    with pytest.raises(CheckpointError, match="checkpoint-000001"):
        manager.resume(run.state(folder, 0), run.callbacks)
    assert not evil.touched


@pytest.mark.parametrize("ema", [False, True])
def test_a_warm_start_or_an_export_from_a_checkpoint(tmp_path, evil, plant, ema):
    folder = tmp_path / "out"
    new_run(Shape()).train(
        folder, 1, CheckpointManager(CheckpointConfig(every_steps=1), folder, {})
    )
    checkpoint = folder / "checkpoint-000001"
    for file in (checkpoint / ("ema" if ema else "roles")).rglob("*.safetensors"):
        plant(file)
    sign(checkpoint)
    [source, *_] = StoredCheckpoint.open(checkpoint).weights("student", ema=ema).values()
    with pytest.raises(CheckpointError, match="checkpoint-000001"):
        source.read(source.describe())
    assert not evil.touched


# -- data, judge, run file ------------------------------------------------------------------------


def test_a_data_sets_shard(tmp_path, evil, plant):
    text = Condition({"text": torch.ones(2, 3, 4)})
    with ShardWriter(tmp_path / "data") as writer:
        writer.add(["a", "b"], ["x", "y"], torch.ones(2, 2, 1, 2, 2), text)
    [shard] = (tmp_path / "data").glob("shard-*.safetensors")
    plant(shard)
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    index["shards"][0]["bytes"] = shard.stat().st_size
    (tmp_path / "data" / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=shard.name):
        LatentDataset(DataConfig(path=str(tmp_path / "data"))).read(torch.tensor([0]))
    assert not evil.touched


def test_a_judge(tmp_path, evil, plant):
    config = JudgeConfig(
        attributes={"digit": ("zero", "one")},
        frames=5, height=16, width=16, width_factor=4, features=7,
    )  # fmt: skip
    Judge(ClipJudge(config).eval(), batch=2).save(tmp_path / "judge")
    plant(tmp_path / "judge" / "judge.safetensors")
    with pytest.raises(WeightsError, match="judge"):
        Judge.load(tmp_path / "judge")
    plant(tmp_path / "judge" / "reference.safetensors")
    with pytest.raises(DataError, match="reference"):
        read_reference(tmp_path / "judge")
    assert not evil.touched


def test_a_program_that_is_not_the_one_expected(tmp_path, evil, plant):
    file = tmp_path / "i3d_torchscript.pt"
    plant(file)
    with pytest.raises(WeightsError, match="is expected"):
        load_pinned_program(file, I3D_SHA256, torch.device("cpu"))
    trusted = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match="no TorchScript file"):
        load_pinned_program(file, trusted, torch.device("cpu"))
    assert not evil.touched


def test_a_network_of_a_metric(tmp_path, evil, plant):
    plant(tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match="does not hold the weights"):
        load_network("torch.nn:Flatten", tmp_path / "weights.safetensors")
    assert not evil.touched


def test_a_run_file(tmp_path, evil):
    (tmp_path / "run.yaml").write_text(
        f"recipe: !!python/object/apply:os.system ['touch {evil.marker}']\n"
    )
    assert read_source(tmp_path / "run.yaml").problems
    assert not evil.touched


# -- the code -------------------------------------------------------------------------------------

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
INTERPRETS_WITHOUT_CALLING = "distill_checkpoint/foreign/safe_dcp.py"
NAMES_ITS_ERROR = "distill_preprocess/pairs.py"  # tests/preprocess_app/test_pairs.py
RUNS_ONE_KNOWN_FILE = "distill_evaluation/shipped_metrics/i3d.py"


def unpickling_calls(file: Path) -> list[str]:
    """Find calls in a source file that unpickle, or run a file's own code."""
    calls = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        calls += [
            name
            for name in names
            if name.split(".")[0] in UNPICKLERS or name in ("FileSystemReader", "format_utils")
        ]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and options.get("weights_only") != "True":
            calls.append(called)
        if called in ("torch.jit.load", "np.load", "numpy.load", "eval", "exec", "yaml.load"):
            calls.append(called)
        if called.endswith(".from_pretrained") and not (
            options.get("use_safetensors") == "True" or options.get("trust_remote_code") == "False"
        ):
            calls.append(called)
    return calls


def test_no_other_module_unpickles():
    """Whoever adds one adds a test above."""
    sources = [*WORKSPACE.glob("packages/*/src/**/*.py"), *WORKSPACE.glob("apps/**/*.py")]
    assert len(sources) > 50
    open_doors = {file.as_posix(): unpickling_calls(file) for file in sources}
    exempt = {
        INTERPRETS_WITHOUT_CALLING: "pickle",
        NAMES_ITS_ERROR: "pickle",
        RUNS_ONE_KNOWN_FILE: "torch.jit.load",
    }
    for ending, call in exempt.items():
        [name] = [name for name in open_doors if name.endswith(ending)]
        assert open_doors.pop(name) == [call]
    assert {name: calls for name, calls in open_doors.items() if calls} == {}
