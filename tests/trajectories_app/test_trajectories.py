"""Trajectories of the shipped tiny teacher: what they hold, that they survive a kill, and that kd
trains on them."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distill_adapters_wan import PLUGIN, WanPipelineConfig
from distill_conditioning import DataConfig, LatentDataset
from distill_protocols import ConfigError, RoleSpec, RowGenerators, SamplerSpec
from distill_runfile.cli import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USAGE,
)
from distill_runfile.read import read_config
from distill_runtime import claim_folder
from distill_train.cli import main as train
from distill_trajectories.cli import main
from distill_trajectories.request import read_request
from distill_trajectories.run import Teacher

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny"
PIPELINE = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8}
TIMES = (1000.0, 700.0)


def request(output_dir: Path) -> dict[str, Any]:
    """Return trajectories.yaml with absolute paths, few clips and shards of half a second."""
    values = yaml.safe_load((TINY / "trajectories.yaml").read_text())
    values["models"]["teacher"]["path"] = str(TINY / "wan")
    values["data"]["path"] = str(TINY / "data")
    values["trajectories"] |= {
        "output_dir": str(output_dir), "limit": 8, "batch_size": 2, "samples_per_shard": 2,
        "dtype": "float32",
    }  # fmt: skip
    return values


def written(folder: Path, values: dict[str, Any], name: str = "trajectories.yaml") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory) -> Path:
    """Make a data set without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["--config", str(written(folder, request(folder / "data")))]) == EXIT_OK
    return folder / "data"


def test_trajectories_begin_at_noise_and_end_at_the_samplers_clip_bit_for_bit(dataset_folder):
    torch.set_num_threads(1)
    pipeline = WanPipelineConfig(**PIPELINE)
    spec = RoleSpec(name="teacher", path=str(TINY / "wan"), trainable=False)
    bundle = PLUGIN.load([spec], pipeline, device=torch.device("cpu"))
    adapter = PLUGIN.adapter(bundle, pipeline, source=spec.path)
    source = LatentDataset(DataConfig(path=str(TINY / "data")))
    dataset = LatentDataset(DataConfig(path=str(dataset_folder), verify="full"), times=TIMES)
    assert len(dataset) == 8
    full = dataset.read(torch.arange(8))
    assert full.ids[3] == "digit-00003.0"
    noise = RowGenerators.seeded(0, "trajectories.noise", range(8)).normal(adapter.latent_shape)
    assert torch.equal(full.trajectory[:, 0], noise)
    cond = source.read(torch.arange(8)).cond
    assert torch.equal(full.cond.tensors["text"], cond.tensors["text"])
    negative = dataset.negative().condition
    sampler = SamplerSpec(steps=32, shift=3.0, guidance=1.5)
    for first in range(0, 8, 2):
        rows = slice(first, first + 2)
        clip = adapter.sample("teacher", sampler, noise[rows], cond[rows], neg_cond=negative)
        assert torch.equal(full.latents[rows], adapter.denormalize_latents(clip))
    # What is kept on the way lies on it: sampling on from there ends at the same clip.
    rest = SamplerSpec(steps=14, timesteps=tuple(1000 * s for s in sampler.sigmas()[18:]),
                       guidance=1.5)  # fmt: skip
    assert rest.timesteps[0] == pytest.approx(700)
    again = adapter.sample("teacher", rest, full.trajectory[:, 1], cond, neg_cond=negative)
    torch.testing.assert_close(adapter.denormalize_latents(again), full.latents, rtol=0, atol=1e-4)
    assert (full.trajectory[:, 1] - full.trajectory[:, 0]).abs().mean() > 0.1


def test_a_killed_process_goes_on_and_the_end_is_the_same_byte_for_byte(
    dataset_folder, tmp_path, capsys
):
    config = written(tmp_path, request(tmp_path / "data"))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "apps" / "trajectories"), "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 300
    while not list((tmp_path / "data").glob("shard-*.safetensors")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "data" / "index.json").exists()
    first = tmp_path / "data" / "shard-00000.safetensors"
    kept = first.stat().st_mtime_ns
    assert 1 <= len(list((tmp_path / "data").glob("shard-*.safetensors"))) < 4
    capsys.readouterr()
    assert main(["--config", str(config)]) == EXIT_OK
    assert first.stat().st_mtime_ns == kept
    assert contents(tmp_path / "data") == contents(dataset_folder)


def test_a_stop_on_request_keeps_whole_shards(dataset_folder, tmp_path, monkeypatch, capsys):
    config = written(tmp_path, request(tmp_path / "data"))
    add, calls = Teacher.add, []

    def stopped(teacher, folder, rows, numbers):
        calls.append(numbers)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        add(teacher, folder, rows, numbers)

    monkeypatch.setattr(Teacher, "add", stopped)
    assert main(["--config", str(config)]) == EXIT_STOPPED
    assert "2 whole shards are" in capsys.readouterr().out
    assert main(["--config", str(config)]) == EXIT_OK
    assert len(calls) == 5  # two, the one that was left, and the rest
    assert contents(tmp_path / "data") == contents(dataset_folder)


def test_processes_share_the_shards(dataset_folder, tmp_path, monkeypatch):
    config = written(tmp_path, request(tmp_path / "data"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert not (tmp_path / "data" / "index.json").exists()
        assert main(["--config", str(config)]) == EXIT_OK
    assert contents(tmp_path / "data") == contents(dataset_folder)


def test_a_second_start_in_the_same_folder_is_refused(tmp_path, capsys):
    config = written(tmp_path, request(tmp_path / "data"))
    with claim_folder(tmp_path / "data", "worker-0"):
        assert main(["--config", str(config)]) == EXIT_FAILED
    assert "another process is writing there (pid " in capsys.readouterr().err
    assert list((tmp_path / "data").iterdir()) == []


def test_other_settings_are_refused_and_nothing_is_touched(
    dataset_folder, tmp_path, capsys, caplog
):
    before = contents(dataset_folder)
    values = request(dataset_folder)
    values["trajectories"]["sampler"]["guidance"] = 2.0
    values["trajectories"]["seed"] = 3
    assert main(["--config", str(written(tmp_path, values))]) == EXIT_FAILED
    error = capsys.readouterr().err
    assert "sampler.guidance was 1.5 and is 2.0" in error
    assert "seed was 0 and is 3" in error
    assert "name a new folder" in error
    assert (
        main(["--config", str(written(tmp_path, request(dataset_folder))), "--limit", "3"])
        == EXIT_OK
    )
    assert "nothing to do" in caplog.text
    assert contents(dataset_folder) == before


def test_a_plan_makes_nothing(tmp_path, capsys):
    config = written(tmp_path, request(tmp_path / "data"))
    assert main(["--config", str(config), "--dry-run", "--limit", "5"]) == EXIT_OK
    plan = capsys.readouterr().out
    assert "5 clips in 3 shards" in plan
    assert "64 model calls a clip" in plan
    assert "x_t at t = 1000, 700" in plan
    assert not (tmp_path / "data").exists()


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def spoil(values: dict[str, Any]) -> None:
        for key in path[:-1]:
            values = values.setdefault(key, {})
        values[path[-1]] = value

    return spoil


own = lambda key, value: put("trajectories", key, value=value)  # noqa: E731
SPOILT: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a method": (put("recipe", "method", value="kd"), "recipe.method: unknown key"),
    "a section of training": (put("training", value={}), "training: unknown key"),
    "no data": (lambda v: v.pop("data"), "data: missing section"),
    "no section": (lambda v: v.pop("trajectories"), "trajectories: missing section"),
    "no role": (put("models", value={}), "models: none: one role is sampled"),
    "two roles": (
        put("models", "critic", value={"path": str(TINY / "wan")}),
        "models: critic, teacher: one role is sampled",
    ),
    "a learner": (put("models", "teacher", "trainable", value=True), "teacher.trainable: true"),
    "no such model": (put("models", "teacher", "path", value="/nowhere"), "models.teacher.path: "),
    "no such data": (put("data", "path", value="/nowhere"), "data.path: /nowhere: no such folder"),
    "a multistep solver": (
        own("sampler", {"steps": 4, "solver": "unipc"}), "sampler: solver unipc corrects",
    ),
    "a stochastic sampler": (
        own("sampler", {"steps": 4, "stochastic": True}), "sampler: stochastic: true draws",
    ),
    "a second guidance": (
        own("sampler", {"steps": 32, "shift": 3.0, "guidance_2": 2.0}), "sampler.guidance_2: 2 ",
    ),
    "a time between steps": (
        own("keep_times", [1000, 710]), "710 is no level of the sampler, which passes 700 (step 18",
    ),
    "times that rise": (own("keep_times", [700, 1000]), "must fall strictly"),
    "times and steps": (own("keep_steps", [0, 18]), "[0, 18] beside keep_times [1000.0, 700.0]"),
    "nothing kept": (own("keep_times", []), "[] beside keep_times []"),
    "a step too many": (
        lambda v: v["trajectories"].update(keep_times=[], keep_steps=[0, 32]), "within 0 .. 31",
    ),
    "no clips": (own("limit", 0), "trajectories.limit: 0 must be at least 1"),
    "into the captions": (own("output_dir", str(TINY / "data")), "output_dir: "),
    "into a file": (own("output_dir", str(TINY / "dmd2.yaml")), "is a file"),
    "a causal teacher": (
        put("pipeline_config", "causal", value={"roles": ["teacher"], "chunk_frames": 1}),
        "pipeline_config.causal.roles: 'teacher' is causal",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_problems_name_the_value_and_the_line(name, tmp_path):
    spoil, expected = SPOILT[name]
    values = copy.deepcopy(request(tmp_path / "data"))
    spoil(values)
    with pytest.raises(ConfigError) as excinfo:
        read_request(written(tmp_path, values))
    assert any(expected in problem for problem in excinfo.value.problems), excinfo.value.problems
    assert all(problem.startswith("trajectories.yaml:") for problem in excinfo.value.problems)


def test_a_wrong_file_ends_with_its_status_and_writes_nothing(tmp_path, capsys):
    values = request(tmp_path / "data")
    values["trajectories"] |= {"limit": 0, "sede": 1}
    assert main(["--config", str(written(tmp_path, values))]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "did you mean 'seed'" in error
    assert "2 problems; nothing was made" in error
    assert not (tmp_path / "data").exists()


def kd_run(tmp_path: Path, name: str, data: Path) -> dict[str, Any]:
    values = yaml.safe_load((TINY / f"{name}.yaml").read_text())
    values["models"]["student"]["path"] = str(TINY / "wan")
    values["data"]["path"] = str(data)
    values["training"] |= {
        "output_dir": str(tmp_path / "out"), "max_train_steps": 3, "global_batch_size": 4,
        "progress": False, "trackers": [],
    }  # fmt: skip
    values["training"]["optimizer"] = {"lr": 0.0005}
    del values["callbacks"]["report"]
    return values


@pytest.mark.parametrize("name", ["kd", "kd_causal"])
def test_the_tiny_kd_run_files_run(name, dataset_folder, tmp_path):
    file = written(tmp_path, kd_run(tmp_path, name, dataset_folder), "run.yaml")
    assert train(["--config", str(file)]) == EXIT_OK
    assert (tmp_path / "out" / "student" / "transformer").is_dir()


def test_kd_without_its_trajectories_is_refused_before_reading(dataset_folder, tmp_path):
    run = kd_run(tmp_path, "kd", TINY / "data")
    with pytest.raises(ConfigError) as excinfo:
        read_config(written(tmp_path, run, "run.yaml"))
    [problem] = excinfo.value.problems
    assert "data.path: " in problem
    assert "no trajectories" in problem
    assert "apps/trajectories" in problem
    run = kd_run(tmp_path, "kd", dataset_folder)
    run["method_config"]["student_sampler"] = {"steps": 2, "shift": 3.0, "stochastic": True}
    with pytest.raises(ConfigError) as excinfo:
        read_config(written(tmp_path, run, "run.yaml"))
    [problem] = excinfo.value.problems
    assert "no level t = 750 among those stored (1000, 700)" in problem
    run["data"]["path"] = str(tmp_path / "later")
    assert read_config(written(tmp_path, run, "run.yaml"), planning=True)


def test_ctrl_c_while_the_file_is_read_prints_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distill_trajectories.cli.read_request", interrupt)
    assert main(["--config", str(tmp_path / "file.yaml")]) == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "interrupted: nothing was made\n"
