"""Minutes long: the shipped run file as it stands, and what its student is worth."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow


def test_the_two_step_student_is_near_its_teacher(tiny, tmp_path, app):
    done = app("--config", tiny("dmd2", training={"global_batch_size": 64}))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    by_name = {entry["name"]: entry for entry in report["entries"]}
    student, teacher = by_name["student_2"], by_name["teacher_32"]
    assert student["frechet_distance"] <= 1.25 * teacher["frechet_distance"]
    assert student["frechet_distance"] <= 0.5 * by_name["teacher_2"]["frechet_distance"]
    assert student["within_caption_variance"] >= 0.9 * teacher["within_caption_variance"]
    assert student["accuracy"]["digit"] >= 0.9
    assert student["accuracy"]["direction"] >= 0.99
    assert student["model_calls_per_clip"] == 2
