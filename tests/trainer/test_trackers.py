"""What trackers write can be read by others."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from pathlib import Path

import pytest
import torch
from distill_protocols import ConfigError
from distill_trainer import DistillTrainer, JsonlTracker, TensorBoardTracker, build_trackers
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
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
            tracker.log_scalars(step, {"x": value})
        tracker.close()
    seen = [(s.step, s.value) for s in _events(tmp_path).Scalars("x")]
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
