"""Held-out data of a run file: what is wrong with them, and what checkpoints are kept by."""

from __future__ import annotations

import pytest
from distill_protocols import ConfigError
from distill_runfile.read import read_config
from run_files import TINY

PROMPTS = {"prompts": ["the digit one moving up"], "views": {"a": {"role": "student"}}}


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({}, "validation.prompts: [] must hold at least one prompt"),
        ({"views": PROMPTS["views"], "share": 0.1}, "validation.prompts: [] must hold"),
        ({"prompts": ["a"], "share": 0.1}, "validation.views: {} must hold at least one view"),
        ({"share": 0.00001}, "validation.share: 1e-05 of 12000 samples is none"),
        ({"share": 0.6}, "validation.share: 0.6 must be above 0 and at most 0.5"),
        ({"share": 0.1, "data": {"path": "x"}}, "validation.share: 0.1 beside data"),
        ({"data": {"path": str(TINY / "data")}}, "validation.data.path: "),
        ({"data": {"path": "./nowhere"}}, "validation.data.path: "),
        ({"share": 0.1, "batches": 0}, "validation.batches: 0 must be within [1, 10000]"),
    ],
)
def test_what_is_wrong_is_said(values, write, section, problem):
    values["validation"] = section
    with pytest.raises(ConfigError) as error:
        read_config(write(values))
    (found,) = error.value.problems
    assert problem in found


def test_losses_can_be_measured_without_clips(values, write):
    values["validation"] = {"share": 0.1, "every_steps": 2}
    config = read_config(write(values))
    assert config.validation is not None
    assert config.validation.measures_losses


@pytest.mark.parametrize(
    ("metric", "problem"),
    [
        ("validation/loss/dmd_loss", None),
        ("validation/drift/critic_loss", None),
        # Student and critic step in some iterations, the critic alone in others.
        ("validation/loss/total_loss", "is measured by no callback"),
        ("validation/loss/dmd_los", "did you mean 'validation/loss/dmd_loss'?"),
    ],
)
def test_checkpoints_are_kept_by_them(values, write, metric, problem):
    values["validation"] = {"share": 0.1, "every_steps": 2}
    values["checkpoint"] |= {"every_steps": 2, "keep_best": {"metric": metric}}
    if problem is None:
        read_config(write(values))
        values["validation"]["every_steps"] = 5
        problem = "Set validation.every_steps and checkpoint.every_steps alike"
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_best\.metric") as error:
        read_config(write(values))
    assert problem in str(error.value)
