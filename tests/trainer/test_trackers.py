"""What trackers write can be read by others."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from distill_protocols import Callback, ConfigError, RunDescription, RunState, StepRecord
from distill_trainer import DistillTrainer, JsonlTracker, TensorBoardTracker, build_trackers
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from toy_trainer import MemoryCheckpointer, alternating, batches, training


def _events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard_holds_scalars_texts_and_animated_clips(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path)
    tracker.log_scalars(3, {"loss/total_loss": 0.5})
    tracker.log_text(3, "parameters", "| a | b |")
    clips = torch.zeros(2, 3, 4, 8, 8)
    clips[1, 0, 2] = 1.0  # the second clip is red in its third frame
    tracker.log_video(3, "validation/live", clips, fps=8)
    tracker.close()
    events = _events(tmp_path)
    (scalar,) = events.Scalars("loss/total_loss")
    assert (scalar.step, scalar.value) == (3, 0.5)
    assert "parameters/text_summary" in events.Tags()["tensors"]
    (image,) = events.Images("validation/live")
    assert (image.step, image.height, image.width) == (3, 8, 20)
    with Image.open(io.BytesIO(image.encoded_image_string)) as gif:
        assert gif.format == "GIF"
        total = 0
        for index in range(gif.n_frames):
            gif.seek(index)
            total += gif.info["duration"]
        assert total == pytest.approx(4 * 125, abs=4 * 10), "frames alike may be merged"
        gif.seek(1)
        red = gif.convert("RGB").getpixel((12, 4))
        assert red[0] > 200
        assert max(red[1:]) < 50


def test_a_resumed_run_hides_metrics_of_repeated_iterations(tmp_path: Path) -> None:
    for resumed, steps, value in ((0, (1, 2, 3), 1.0), (2, (3, 4), 2.0)):
        tracker = TensorBoardTracker(tmp_path)
        tracker.resume(resumed)
        for step in steps:
            tracker.log_scalars(step, {"a/x": value})
        tracker.close()
    seen = [(s.step, s.value) for s in _events(tmp_path).Scalars("a/x")]
    assert seen == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_jsonl_is_whole_lines_at_once_with_words_for_what_json_lacks(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    tracker = JsonlTracker(path)
    tracker.log_scalars(1, {"a": 0.25, "b": math.nan, "c": -math.inf})
    entry = json.loads(path.read_text())  # before close: a killed run keeps its lines
    assert {k: entry[k] for k in ("iteration", "a", "b", "c")} == {
        "iteration": 1, "a": 0.25, "b": "nan", "c": "-inf",
    }  # fmt: skip
    tracker.close()


def test_jsonl_appends_and_does_not_join_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iterat')
    tracker = JsonlTracker(path)
    tracker.log_scalars(2, {"a": 1.0})
    tracker.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[2])["iteration"] == 2
    tracker = JsonlTracker(path)
    with path.open("a") as file:
        file.write('{"iterat')
    tracker.resume(2)
    assert path.read_text().splitlines() == lines, "half a line is dropped by a resume"


def test_a_run_writes_what_its_configuration_names(tmp_path: Path) -> None:
    config = training(tmp_path, 4, trackers=("tensorboard", "jsonl"), log_every=2)
    DistillTrainer(config).run(alternating(), batches())
    resumed = training(tmp_path, 6, trackers=("tensorboard", "jsonl"), log_every=2)
    DistillTrainer(resumed, checkpointer=MemoryCheckpointer(resume_at=4)).run(
        alternating(), batches()
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [2, 4, 6]
    scalars = _events(tmp_path / "tensorboard").Scalars("loss/total_loss")
    assert [s.step for s in scalars] == [2, 4, 6]
    assert scalars[0].value == pytest.approx(lines[0]["loss/total_loss"])


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_without_the_package_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"wandb must be installed"):
        build_trackers(("wandb",), tmp_path)


DESCRIPTION = RunDescription(
    name="mine",
    run_file="# my run\nrecipe: {method: dmd2}\n",
    settings={
        "training": {"seed": 3, "optimizer": {"lr": 4e-4}},
        "data": {"path": "/d"},
        "x": None,
    },
)


class _Measures(Callback):
    """Measures something at the end of a run, as a report does."""

    def on_train_end(self, run: RunState) -> None:
        run.metrics["report/student/fd"] = 5.5


def _train_described(folder: Path, *trackers: str, steps: int = 4, resume_at: int = 0) -> None:
    DistillTrainer(
        training(folder, steps, trackers=trackers, log_every=2, global_batch_size=1),
        callbacks=[_Measures()],
        description=DESCRIPTION,
        checkpointer=MemoryCheckpointer(resume_at=resume_at) if resume_at else None,
    ).run(alternating(), batches())


def test_tensorboard_shows_main_curves_first_the_run_file_and_what_came_of_it(tmp_path) -> None:
    _train_described(tmp_path, "tensorboard")
    events = _events(tmp_path / "tensorboard")
    tags = events.Tags()["scalars"]
    assert sorted(tags, key=str.lower)[0].startswith("0_main/loss/")
    main = [(s.step, s.value) for s in events.Scalars("0_main/loss/total_loss")]
    assert main == [(s.step, s.value) for s in events.Scalars("loss/total_loss")]
    assert not [tag for tag in tags if "/" not in tag], "each would be a group of its own"
    assert events.Scalars("final/report/student/fd")[0].value == 5.5
    assert "final/loss/total_loss" in tags
    assert [s.value for s in events.Scalars("progress/samples")] == [2.0, 4.0]
    layout = layout_pb2.Layout()
    [config] = events.Tensors("custom_scalars__config__")
    layout.ParseFromString(config.tensor_proto.string_val[0])
    patterns = [tag for c in layout.category for chart in c.chart for tag in chart.multiline.tag]
    assert any(re.search(pattern, "loss/total_loss") for pattern in patterns)
    [text] = events.Tensors("run_file/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "    # my run\n    recipe: {method: dmd2}\n"
    hparams = plugin_data_pb2.HParamsPluginData()
    metadata = events.SummaryMetadata("_hparams_/session_start_info")
    hparams.ParseFromString(metadata.plugin_data.content)
    assert hparams.session_start_info.hparams["training.optimizer.lr"].number_value == 4e-4


def test_a_second_start_keeps_every_point(tmp_path) -> None:
    _train_described(tmp_path / "whole", "tensorboard", steps=8)
    _train_described(tmp_path / "parts", "tensorboard", steps=5)
    _train_described(tmp_path / "parts", "tensorboard", steps=8, resume_at=4)
    whole, parts = (_events(tmp_path / name / "tensorboard") for name in ("whole", "parts"))
    assert parts.Tags() == whole.Tags()
    for tag in whole.Tags()["scalars"]:
        assert [s.step for s in parts.Scalars(tag)] == [s.step for s in whole.Scalars(tag)], tag


def test_a_run_that_is_stopped_has_no_final_numbers(tmp_path) -> None:
    class Stop(Callback):
        def on_step_end(self, run: RunState, step: StepRecord) -> None:
            run.request_stop("asked")

    config = training(tmp_path, 4, trackers=("tensorboard",), log_every=1)
    DistillTrainer(config, callbacks=[Stop()], description=DESCRIPTION).run(
        alternating(), batches()
    )
    tags = _events(tmp_path / "tensorboard").Tags()["scalars"]
    assert tags
    assert not [tag for tag in tags if tag.startswith("final/")]


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_holds_points_of_both_starts_params_and_artifacts(tmp_path, monkeypatch) -> None:
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    _train_described(tmp_path, "mlflow")
    _train_described(tmp_path, "mlflow", steps=6, resume_at=4)
    [tracker] = build_trackers(("mlflow",), tmp_path)
    tracker.log_video(6, "validation/live", torch.zeros(1, 3, 2, 8, 8), fps=8)
    tracker.close()
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    [experiment] = [e for e in client.search_experiments() if e.name == "distill"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "loss/total_loss")
    assert [metric.step for metric in history] == [2, 4, 6]
    assert run.data.metrics["final/report/student/fd"] == 5.5
    assert run.data.params["training.optimizer.lr"] == "0.0004"
    names = {
        a.path for f in (None, "validation") for a in client.list_artifacts(run.info.run_id, f)
    }
    assert {"run_file.yaml", "validation/live-000006.gif"} <= names


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_keeps_a_run_offline(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _train_described(tmp_path, "wandb")
    [file] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for part in (b"loss/total_loss", b"final/report/student/fd", b"# my run"):
        assert part in content


def test_mlflow_without_the_package_is_a_clear_error(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("distill_trainer.plugins.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mlflow must be installed"):
        build_trackers(("mlflow",), tmp_path)
