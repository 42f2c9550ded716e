"""Validation: what is shown, what is kept, and that the run does not notice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distill_media import SheetRow, read_mp4, write_contact_sheet
from distill_protocols import Callback, ModelBundle, SamplerSpec
from distill_trainer import (
    DistillTrainer,
    EmaCallback,
    EmaConfig,
    ValidationCallback,
    ViewConfig,
)
from distill_trainer.config import PredictionsConfig
from distill_trainer.trackers.tensorboard import TensorBoardTracker
from distill_trainer.validation import files
from distill_trainer.validation.predictions import source_view
from PIL import Image
from toy_trainer import (
    MemoryCheckpointer,
    MemoryTracker,
    Prompts,
    Recorder,
    Sampling,
    alternating,
    batches,
    linear_role,
    training,
    validation_config,
)


def test_any_name_that_files_may_have_is_shown(tmp_path: Path) -> None:
    names = ["two words", "漢字", "a%s {x}", "-rf", "c:d", "#?&'\"<b>", "x" * 200]
    views = {name: ViewConfig(role="student") for name in names}
    trackers: list[Any] = [TensorBoardTracker(tmp_path / "tb"), MemoryTracker()]
    callback = ValidationCallback(
        validation_config(views=views, every_steps=0, prompts=("红狐狸 🦊", "ثعلب")), Prompts()
    )
    DistillTrainer(training(tmp_path, 1), callbacks=[callback], trackers=trackers).run(
        Sampling(alternating(1).bundle, 1), batches()
    )
    shown = [name.removeprefix("validation/") for _, name, _ in trackers[1].videos]
    assert shown == names
    folder = tmp_path / "validation" / "iteration-000001"
    assert {p.name for p in folder.iterdir()} == {*names, "sheet.png", "validation.json"}
    assert {p.stem for p in (tmp_path / "validation" / "over_time").iterdir()} == set(names)


def test_validation_does_not_change_the_run(tmp_path: Path) -> None:
    weights = []
    for look in (False, True):
        method = Sampling(alternating(2).bundle, 2)
        method.bundle["critic"].modules["net"].eval()
        callbacks: list[Callback] = [EmaCallback(EmaConfig(roles=("student",), decay=0.5))]
        if look:
            callbacks.append(ValidationCallback(validation_config(at_start=True), Prompts()))
        draws = method.streams.get("noise").get_state()
        ambient = torch.get_rng_state()
        DistillTrainer(training(tmp_path, 5), callbacks=callbacks).run(method, batches())
        assert torch.equal(method.streams.get("noise").get_state(), draws)
        assert torch.equal(torch.get_rng_state(), ambient)
        assert method.bundle["student"].modules["net"].training
        assert not method.bundle["critic"].modules["net"].training
        weights.append([p.detach().clone() for p in method.model_dict["student.net"].parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_validation_samples_at_its_iterations_and_writes_the_clips(tmp_path: Path) -> None:
    method, tracker = Sampling(alternating(1).bundle, 1), MemoryTracker()
    callbacks = [
        EmaCallback(EmaConfig(roles=("student",), decay=0.9)),
        ValidationCallback(validation_config(at_start=True), Prompts()),
    ]
    DistillTrainer(training(tmp_path, 5), callbacks=callbacks, trackers=[tracker]).run(
        method, batches()
    )
    assert [(i, n) for i, n, _ in tracker.videos] == [
        (i, f"validation/{view}") for i in (0, 2, 4, 5) for view in ("live", "ema")
    ]
    live, ema = (
        {i: clip for i, n, clip in tracker.videos if n == f"validation/{view}"}
        for view in ("live", "ema")
    )
    assert torch.equal(live[0], ema[0]), "same noise, and the same weights at first"
    assert not torch.equal(live[5], ema[5])
    folder = tmp_path / "validation" / "iteration-000005"
    names = ["ema", "live", "sheet.png", "validation.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    record = json.loads((folder / "validation.json").read_text())
    assert (record["iteration"], record["fps"], record["prompts"]) == (
        5,
        8.0,
        ["a seven", "a three"],
    )
    assert record["views"]["live"] == {
        "role": "student", "ema": False, "sampler": None,
        "folder": "iteration-000005/live", "files": ["000.mp4", "001.mp4"], "frames": 2,
    }  # fmt: skip
    clip = read_mp4(folder / "live" / "001.mp4")
    assert clip.shape == (2, 128, 128, 3), "4 pixels, enlarged to be seen"
    shown = live[5][1].movedim(0, -1).numpy() * 255
    assert np.abs(clip.astype(float) - shown[:, -128:]).mean() < 6
    strip = Image.open(tmp_path / "validation" / "over_time" / "live.png")
    one_row = Image.open(tmp_path / "validation" / "iteration-000000" / "sheet.png").height / 2
    assert strip.height > 3.5 * one_row, "a row for 0, 2, 4 and 5"


def test_a_resumed_or_stopped_run_skips_validation_at_start_or_end(tmp_path: Path) -> None:
    class Stopper(Recorder):
        def on_step_end(self, run, step):  # type: ignore[no-untyped-def]
            run.request_stop("preempted")

    tracker = MemoryTracker()
    callbacks = [ValidationCallback(validation_config(at_start=True, every_steps=0, views={
        "live": ViewConfig(role="student")}), Prompts()), Stopper()]  # fmt: skip
    DistillTrainer(
        training(tmp_path, 5), callbacks=callbacks, trackers=[tracker],
        checkpointer=MemoryCheckpointer(resume_at=2),
    ).run(Sampling(alternating(1).bundle, 1), batches())  # fmt: skip
    assert tracker.videos == []


@pytest.mark.parametrize("resumed", [0, 4])
def test_the_validation_of_the_last_iteration_is_not_done_again_at_the_end(
    tmp_path: Path, resumed: int
) -> None:
    """Unless the process begins there, which has seen none."""
    method, tracker = Sampling(alternating(1).bundle, 1), MemoryTracker()
    views = {"live": ViewConfig(role="student")}
    (tmp_path / "validation" / f".iteration-000004.{'0' * 32}.part").mkdir(parents=True)  # a kill
    DistillTrainer(
        training(tmp_path, 4),
        callbacks=[ValidationCallback(validation_config(every_steps=2, views=views), Prompts())],
        trackers=[tracker],
        checkpointer=MemoryCheckpointer(resume_at=resumed),
    ).run(method, batches())
    assert [i for i, _, _ in tracker.videos] == ([4] if resumed else [2, 4])
    written = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert written == [*["iteration-000002", "iteration-000004"][bool(resumed) :], "over_time"]


class Counting(Sampling):
    """With a teacher, which is frozen; the names of the views that were sampled."""

    def __init__(self, teacher_seed: int) -> None:
        bundle = alternating(1).bundle
        teacher = linear_role("teacher", trainable=False, seed=teacher_seed)
        super().__init__(ModelBundle({**bundle.roles, "teacher": teacher}), 1)
        self.sampled: list[str] = []

    def sample_for_logging(self, views: Any, cond: Any, **options: Any) -> Any:
        self.sampled += [view.name for view in views]
        return super().sample_for_logging(views, cond, **options)


def _run_with_teacher(
    folder: Path, *, start: int = 0, path: str = "a", teacher_seed: int = 9,
    view: Mapping[str, Any] | None = None, **changes: Any,
) -> tuple:  # fmt: skip
    method, tracker = Counting(teacher_seed), MemoryTracker()
    views = {
        "teacher": ViewConfig(role="teacher", **(view or {})),
        "live": ViewConfig(role="student"),
    }
    callback = ValidationCallback(
        validation_config(views=views, **changes), Prompts(), identities={"teacher": path}
    )
    DistillTrainer(
        training(folder, start + 4), callbacks=[callback], trackers=[tracker],
        checkpointer=MemoryCheckpointer(resume_at=start),
    ).run(method, batches())  # fmt: skip
    return method.sampled, [(i, name) for i, name, _ in tracker.videos]


def test_a_frozen_view_is_sampled_once_and_kept_over_a_resume(tmp_path: Path) -> None:
    sampled, videos = _run_with_teacher(tmp_path)
    assert sampled == ["teacher", "live", "live"]
    assert sorted(videos) == [
        (2, "validation/live"), (2, "validation/teacher"), (4, "validation/live"),
    ]  # fmt: skip
    root = tmp_path / "validation"
    (kept,) = (root / "kept").iterdir()
    records = [
        json.loads((root / f"iteration-{n:06d}" / "validation.json").read_text()) for n in (2, 4)
    ]
    assert {record["views"]["teacher"]["folder"] for record in records} == {f"kept/{kept.name}"}
    assert not (root / "iteration-000004" / "teacher").exists()
    before = (root / "iteration-000002" / "sheet.png").read_bytes()

    sampled, videos = _run_with_teacher(tmp_path, start=4)
    assert sampled == ["live", "live"]
    assert (6, "validation/teacher") in videos, "trackers of another process see it anew"
    assert (root / "iteration-000002" / "sheet.png").read_bytes() == before

    # What the clips follow from decides, and a damaged folder is made again.
    others: tuple[dict[str, Any], ...]
    others = (
        {"path": "b"}, {"teacher_seed": 8}, {"seed": 5}, {"prompts": ("a seven", "a two")},
        {"fps": 4.0}, {"view": {"latent_frames": 9}}, {"view": {"sampler": SamplerSpec(steps=3)}},
    )  # fmt: skip
    for changes in others:
        assert _run_with_teacher(tmp_path, start=8, **changes)[0][0] == "teacher", changes
    (kept / "000.mp4").unlink()
    assert _run_with_teacher(tmp_path, start=8)[0] == ["teacher", "live", "live"]
    (tmp_path / "elsewhere.mp4").write_bytes((kept / "000.mp4").read_bytes())
    whole = json.loads((kept / "kept.json").read_text())
    outside = ["../../../elsewhere.mp4", *whole["files"][1:]]
    for changes in ({"frames": 0}, {"frames": 1e300}, {"files": outside}):
        (kept / "kept.json").write_text(json.dumps(whole | changes))
        assert _run_with_teacher(tmp_path, start=8)[0] == ["teacher", "live", "live"], changes


def test_pictures_over_time_hold_former_validations_but_none_of_the_future(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run_with_teacher(tmp_path)
    root = tmp_path / "validation"
    four = Image.open(root / "over_time" / "live.png").height
    (root / "iteration-000002" / "live" / "frames.png").write_bytes(b"damaged")
    shown: list[list[str]] = []

    def write(rows: list[SheetRow], *args: Any, **options: Any) -> None:
        shown.append([row.label for row in rows[1:]])  # behind the teacher's
        write_contact_sheet(rows, *args, **options)

    monkeypatch.setattr(files, "write_contact_sheet", write)
    _run_with_teacher(tmp_path)  # once more from the start: 4 is of another process
    assert [rows for rows in shown if rows[0] == "2"] == [["2"], ["2", "4"]]
    assert Image.open(root / "over_time" / "live.png").height == four
    (root / "iteration-000002" / "live" / "frames.png").write_bytes(b"damaged")
    _run_with_teacher(tmp_path, start=4)
    six_and_eight = Image.open(root / "over_time" / "live.png").height
    row = (six_and_eight - four) / 1
    assert row > 90, "4, 6 and 8, without 2, which cannot be read"
    path = root / "iteration-000004" / "validation.json"
    record = json.loads(path.read_text())
    record["views"]["live"]["frames"] = 0
    path.write_text(json.dumps(record))
    _run_with_teacher(tmp_path, start=4)
    assert Image.open(root / "over_time" / "live.png").height == four, "6 and 8"
    _run_with_teacher(tmp_path, start=8, prompts=("a seven", "another"))
    assert Image.open(root / "over_time" / "live.png").height == four, "10 and 12: other prompts"


def test_the_clips_that_are_noised_are_the_named_ones_or_of_a_frozen_view() -> None:
    def view(frames: int | None = None) -> ViewConfig:
        return ViewConfig(role="any", latent_frames=frames)

    views = {"long": view(9), "live": view(), "old": view(9), "teacher": view(), "other": view()}
    roles = PredictionsConfig(roles=("student",))
    named = PredictionsConfig(roles=("student",), view="live")
    assert source_view(named, views, ("teacher",)) == "live"
    assert source_view(roles, views, ("old", "other", "teacher")) == "teacher", "as in the file"
    assert source_view(roles, views, ("old",)) == "live"
    assert source_view(roles, views, ()) == "live"
