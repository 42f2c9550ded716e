"""Whole runs of the app on the shipped tiny Wan: real processes, real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
import torch
import yaml
from diffusers import WanPipeline
from distill_protocols import RowGenerators
from distill_runfile.cli import (
    EXIT_FAILED,
    EXIT_INCOMPLETE,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_STORAGE,
    EXIT_USAGE,
)
from distill_runfile.read import read_config
from distill_train.cli import main
from distill_trajectories.cli import main as make_trajectories
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import one_process

ROOT = Path(__file__).resolve().parents[2]
SHORT_REPORT = {
    "clips_per_prompt": 2,
    "entries": {
        "teacher_2": {"role": "teacher", "sampler": {"steps": 2, "shift": 3.0, "guidance": 1.5}},
        "student_2": {"role": "student", "ema": True},
        "student_2_live": {"role": "student", "sheet": False},
    },
}


def test_a_dmd2_run_writes_all_documented_files(tiny, tmp_path, capsys, caplog):
    config = tiny(
        "dmd2",
        training={"max_train_steps": 10, "log_every": 5},
        validation={"every_steps": 5},
        callbacks={"report": None},
    )
    # `entries` replaces the shipped ones instead of being laid over them.
    values = yaml.safe_load(config.read_text())
    shipped = yaml.safe_load((ROOT / "configs/tiny/dmd2.yaml").read_text())
    judge = ROOT / "configs" / "tiny" / "judge"
    # Ten prompts of forty, those of the sheet among them.
    lines = (judge / "prompts.txt").read_text().splitlines()
    sheet = shipped["callbacks"]["report"]["sheet_prompts"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([*sheet, *[line for line in lines if line not in sheet][:5]]))
    values["callbacks"]["report"] = shipped["callbacks"]["report"] | SHORT_REPORT | {
        "judge": str(judge), "prompts": str(prompts)
    }  # fmt: skip
    config.write_text(yaml.safe_dump(values, sort_keys=False))

    assert main(["--config", str(config)]) == EXIT_OK
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    assert "student_2_live" in printed
    assert "finished after iteration 10" in caplog.text

    report = json.loads((out / "report.json").read_text())
    assert [entry["name"] for entry in report["entries"]] == list(SHORT_REPORT["entries"])
    assert report["update_counts"] == {"student.transformer": 2, "critic.transformer": 10}
    for entry in report["entries"]:
        assert entry["clips"] == 20
        assert set(entry["accuracy"]) == {"digit", "direction"}
        assert entry["frechet_distance"] > 0
        assert entry["seconds_per_clip"] > 0
    calls = {entry["name"]: entry["model_calls_per_clip"] for entry in report["entries"]}
    assert calls == {"teacher_2": 4, "student_2": 2, "student_2_live": 2}

    with Image.open(out / "contact_sheet.png") as sheet:
        assert sheet.width > 600
    with av.open(str(out / "clips.mp4")) as movie:
        assert sum(1 for _ in movie.decode(video=0)) >= 9

    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert "loss/dmd_loss" in events.Tags()["scalars"]
    assert any("student_2" in tag for tag in events.Tags()["images"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["iteration"] for line in lines if "loss/critic_loss" in line} == {5, 10}

    pipe, info = WanPipeline.from_pretrained(out / "student"), load_info(out / "student")
    assert info == {"missing": [], "unexpected": []}
    assert pipe.transformer.config.num_layers == 4


def load_info(folder: Path) -> dict[str, list[str]]:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    _, info = WanTransformer3DModel.from_pretrained(
        folder / "transformer", output_loading_info=True
    )
    return {"missing": list(info["missing_keys"]), "unexpected": list(info["unexpected_keys"])}


def test_the_exported_student_gives_the_trainers_clip_in_the_stock_pipeline(tiny, tmp_path):
    config = tiny(
        "dmd2", training={"max_train_steps": 5}, callbacks={"report": None}, validation=None
    )
    from distill_train.build import build

    checked = read_config(config)
    run = build(checked, distribution=one_process())
    run.trainer.run(run.method, run.loader)
    prompts = ["the digit three moving up", "the digit seven moving left"]
    spec = run.method.sampler_spec
    run.method.set_trainable("student", False)
    pipe = WanPipeline.from_pretrained(tmp_path / "out" / "student")
    pipe.set_progress_bar_config(disable=True)
    for prompt in prompts:
        noise = RowGenerators.seeded(5, "noise", [0]).normal(run.adapter.latent_shape)
        with run.bundle["student"].averaged(ema=True), torch.no_grad():
            latents = run.adapter.sample(
                "student",
                spec,
                noise,
                run.adapter.encode_condition([prompt]),
                generators=RowGenerators([torch.Generator().manual_seed(7)]),
            )
        ours = run.adapter.decode(latents)
        # The scheduler's re-noise comes from the global generator, which no caller can replace;
        # so of a batch the rows would share one.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            stock = pipe(
                prompt=prompt,
                num_inference_steps=spec.steps,
                guidance_scale=spec.guidance,
                num_frames=9,
                height=32,
                width=32,
                max_sequence_length=8,
                latents=noise.clone(),
                output_type="pt",
            ).frames.permute(0, 2, 1, 3, 4)
        assert ours.shape == stock.shape
        assert torch.equal(ours, stock)


@pytest.mark.parametrize("method", ["finetune", "teacher_only", "finetune_causal", "causvid"])
def test_the_other_tiny_run_files_run(method, tiny, tmp_path):
    config = tiny(
        method,
        training={"max_train_steps": 4, "log_every": 2},
        validation=None,
        callbacks={"report": None},
    )
    assert main(["--config", str(config)]) == EXIT_OK
    assert load_info(tmp_path / "out" / "student") == {"missing": [], "unexpected": []}


_SLOW = pytest.mark.slow
FILES = sorted((ROOT / "configs").glob("*/*.yaml"))
TRAJECTORIES = [file for file in FILES if file.stem.startswith("trajectories")]


def _status_of(plan: str) -> int:
    """Return the exit status of a plan and assert that its last line agrees."""
    is_incomplete = plan.splitlines()[-1].startswith("a run still needs ")
    return EXIT_INCOMPLETE if is_incomplete else EXIT_OK


@pytest.mark.parametrize("config", TRAJECTORIES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_file_of_trajectories_can_be_planned_without_weights(config, capsys):
    status = make_trajectories(["--config", str(config), "--dry-run"])
    plan = capsys.readouterr().out
    assert status == _status_of(plan)
    assert "model calls a clip" in plan


RUNS = [file for file in FILES if file not in TRAJECTORIES]
PLANNED = {
    "tiny-dmd2_gan",
    "tiny-dmd2_lora",
    "wan-causvid_1.3b",
    "wan-dmd2_2.2_i2v_a14b",
    "wan-finetune_2.2_ti2v_5b",
    "ltx-dmd2_2b",
}
"""Heads, LoRA, a causal role, two experts with pictures, a first frame, the other family."""


def name_of(file: Path) -> str:
    return f"{file.parent.name}-{file.stem}"


@pytest.mark.parametrize("config", RUNS, ids=name_of)
def test_every_shipped_run_file_is_valid(config):
    assert read_config(config, planning=True).roles["student"].spec.trainable


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(file, id=name_of(file), marks=() if name_of(file) in PLANNED else _SLOW)
        for file in RUNS
    ],
)
def test_every_run_file_can_be_planned_without_weights(config, capsys):
    status = main(["--config", str(config), "--dry-run"])
    plan = capsys.readouterr().out
    assert status == _status_of(plan)
    if config.parent.name != "tiny":
        assert status == EXIT_INCOMPLETE
    for part in (
        "models",
        "memory",
        "updates in iterations 1..10",
        "batch",
        "data",
        "conditioning",
    ):
        assert f"\n{part}" in plan
    if config.parent.name == "wan":
        models = ("1.3B", "T2V-A14B", "I2V-A14B", "TI2V-5B")
        counts = ("1,418,996,800", "14,288,491,584", "14,288,901,184", "4,999,787,712")
        for model, count in zip(models, counts, strict=True):
            assert (count in plan) == (f"-{model}-Diffusers" in plan) or "T2V-14B" in plan
        if "A14B" in plan:
            assert plan.count("transformer_2  Wan") == 3
            assert plan.count("of which transformer, by t") == 2
    assert not (config.parent / "outputs").exists()


def test_a_second_run_over_the_first_is_refused_and_the_first_stays(tiny, tmp_path, capsys):
    config = tiny("finetune", training={"max_train_steps": 2}, checkpoint={"resume": "none"})
    assert main(["--config", str(config)]) == EXIT_OK
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["--config", str(config)]) == EXIT_FAILED
    message = capsys.readouterr().err
    assert "already holds another run" in message
    assert "resume: latest" in message
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}


def test_an_output_folder_that_is_a_file(tiny, tmp_path, capsys):
    (tmp_path / "out").write_text("in the way")
    assert main(["--config", str(tiny("finetune"))]) == EXIT_USAGE
    assert f"{tmp_path / 'out'} is a file" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "in the way"


def test_an_output_folder_that_cannot_be_made(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    config = tiny("finetune", training={"output_dir": str(tmp_path / "file" / "out")})
    assert main(["--config", str(config)]) == EXIT_STORAGE
    assert "cannot be used as output folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"


def copied_model(tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(ROOT / "configs" / "tiny" / "wan", tmp_path / "wan"))


def test_a_missing_weight_file_is_named_before_anything_starts(tiny, tmp_path, capsys):
    model = copied_model(tmp_path)
    (model / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    config = tiny("finetune", models={"student": {"path": str(model)}})
    assert main(["--config", str(config)]) == EXIT_USAGE
    assert "diffusion_pytorch_model.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_foreign_key_in_the_weights_is_named_and_the_folder_is_free_again(tiny, tmp_path, capsys):
    from safetensors.torch import save_file

    model = copied_model(tmp_path)
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.attn1.to_q.wieght"] = tensors.pop("blocks.0.attn1.to_q.weight")
    save_file(tensors, file)
    config = tiny("finetune", models={"student": {"path": str(model)}})
    assert main(["--config", str(config)]) == EXIT_FAILED
    message = capsys.readouterr().err
    assert "blocks.0.attn1.to_q.wieght" in message
    assert "blocks.0.attn1.to_q.weight" in message
    assert not (tmp_path / "out").exists()


def test_a_corrupted_shard_is_named(tiny, tmp_path, capsys):
    import shutil

    data = Path(shutil.copytree(ROOT / "configs" / "tiny" / "data", tmp_path / "data"))
    shard = next(data.glob("shard-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    config = tiny("finetune", data={"path": str(data)})
    assert main(["--config", str(config)]) == EXIT_USAGE
    message = capsys.readouterr().err
    assert shard.name in message
    assert "truncated" in message
    assert not (tmp_path / "out").exists()


def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_weights(tiny, tmp_path):
    changes = {
        "training": {"max_train_steps": 30, "log_every": 1},
        "checkpoint": {"every_steps": None, "resume": "latest"},
    }
    # Workers read ahead of the step in which the signal comes; the whole run has none.
    config = tiny("finetune", data={"workers": 2}, **changes)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "apps" / "train"), "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_STOPPED, output
    assert "Traceback" not in output
    assert not (tmp_path / "out" / "student").exists()
    assert main(["--config", str(config)]) == EXIT_OK
    interrupted = load_file(final_weights(tmp_path / "out"))

    full = tiny("finetune", file="whole.yaml", **changes)
    text = full.read_text().replace(str(tmp_path / "out"), str(tmp_path / "whole"))
    full.write_text(text)
    assert main(["--config", str(full)]) == EXIT_OK
    uninterrupted = load_file(final_weights(tmp_path / "whole"))
    assert interrupted.keys() == uninterrupted.keys()
    for key, value in uninterrupted.items():
        assert torch.equal(interrupted[key], value), key


@pytest.mark.slow
def test_sigterm_amid_many_micro_steps_does_not_wait_for_the_rest(tiny, tmp_path, caplog):
    """The iteration under way is taken back: what is saved is the one before, whole."""
    changes = {
        "training": {
            "max_train_steps": 2, "log_every": 1, "global_batch_size": 24,
            "batch_size_per_device": 1,
        },
        "method_config": {"generator_update_interval": 2},
        "checkpoint": {"every_steps": None, "resume": "latest", "export": None},
    }  # fmt: skip
    config = tiny(
        "dmd2", callbacks={"report": None, "param_count": None}, validation=None, **changes
    )
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "apps" / "train"), "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)  # into the second iteration
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == EXIT_STOPPED, output
    assert "Traceback" not in output
    assert "stopped after iteration 1 of 2" in output
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-000001"]
    assert main(["--config", str(config)]) == EXIT_OK
    assert "iteration 1 is done" in caplog.text
    numbers = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["iteration"] for line in numbers] == [1, 2]


def test_a_stop_in_the_first_iteration_leaves_the_folder_free(
    tiny, tmp_path, monkeypatch, capsys, caplog
):
    from distill_methods import FinetuneMethod

    def stopped(method, batch, iteration):
        os.kill(os.getpid(), signal.SIGTERM)
        method.stop.poll()

    monkeypatch.setattr(FinetuneMethod, "single_train_step", stopped)
    config = tiny("finetune", training={"max_train_steps": 2}, checkpoint={"resume": "none"})
    for _ in range(2):
        assert main(["--config", str(config)]) == EXIT_STOPPED, capsys.readouterr().err
        assert "stopped after iteration 0 of 2: received SIGTERM" in caplog.text
        assert not (tmp_path / "out" / "run.json").exists()


def final_weights(out: Path) -> Path:
    return out / "student" / "transformer" / "diffusion_pytorch_model.safetensors"
