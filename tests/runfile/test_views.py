"""Views and predictions of a run file that its models cannot give."""

from __future__ import annotations

from typing import Any

import pytest
from distill_adapters_wan import PLUGIN as WAN
from distill_protocols import ConfigError, FrameConditions
from distill_runfile.read import read_config

VIEWS: dict[str, Any] = {"a": {"role": "student"}, "b": {"role": "teacher"}}


def section(**changes: Any) -> dict[str, Any]:
    return {"prompts": ["the digit one moving up"], "views": VIEWS, **changes}


def x0(**changes: Any) -> dict[str, Any]:
    return section(x0={"roles": ["student", "teacher"], **changes})


LONG = {"role": "student", "latent_frames": 9}


@pytest.mark.parametrize(
    ("validation", "problem"),
    [
        (section(views={"a": LONG}), "validation.views.a.latent_frames: 'student' is not causal"),
        (section(views={"x0": VIEWS["a"]}), "validation.views: 'x0' is where predictions are"),
        (
            section(views={"Validation.json": VIEWS["a"]}),
            "validation.views: 'Validation.json' is the record of a validation",
        ),
        (section(views={"sheet.png": VIEWS["a"]}), "'sheet.png' is the picture of all views"),
        (x0(roles=["studnt"]), "validation.x0.roles: there is no role 'studnt'"),
        (x0(roles=[]), "validation.x0.roles: [] must name at least one role"),
        (x0(t=[0]), "validation.x0.t: [0.0] must be times in (0, 1000]"),
        (x0(t=[500, 500.0]), "validation.x0.t: [500.0, 500.0] must name no time twice"),
        (x0(view="c"), "validation.x0: there is no view 'c' whose clips could be noised"),
    ],
)
def test_what_is_wrong_is_said(values, write, validation, problem):
    values["validation"] = validation
    with pytest.raises(ConfigError) as error:
        read_config(write(values))
    (found,) = error.value.problems
    assert problem in found


def test_a_picture_beside_every_frame_ends_with_the_clip(values, write, monkeypatch):
    always = FrameConditions(first="always")
    monkeypatch.setattr(type(WAN), "frame_conditions", lambda *_: always)
    values["pipeline_config"]["causal"] = {"roles": ["student"], "chunk_frames": 1}
    values["validation"] = section(views={"a": LONG, "b": {**LONG, "latent_frames": 3}})
    with pytest.raises(ConfigError) as error:
        read_config(write(values))
    found = [text for text in error.value.problems if "latent_frames" in text]
    assert len(found) == 1
    assert "views.a.latent_frames: 9, but 'student' reads its first frame beside" in found[0]


def test_a_causal_student_may_be_shown_for_longer(values, write):
    values["pipeline_config"]["causal"] = {"roles": ["student"], "chunk_frames": 1}
    values["validation"] = section(views={"a": LONG, **VIEWS}) | {"x0": {"roles": ["student"]}}
    config = read_config(write(values))
    assert config.validation is not None
    values["validation"]["x0"]["view"] = "a"
    values["validation"]["views"] = {"a": LONG}
    with pytest.raises(ConfigError, match=r"validation\.x0: its view makes videos of another"):
        read_config(write(values))
