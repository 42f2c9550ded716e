"""The numbers of configs/ltx that follow from the model's own rule."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from distill_adapters_ltx import LTXPipelineConfig
from distill_adapters_ltx.published import STRIDE_HW, STRIDE_T

FILES = sorted((Path(__file__).parents[2] / "configs" / "ltx").glob("*.yaml"))


def tokens(config):
    cells = (config.height // STRIDE_HW) * (config.width // STRIDE_HW)
    return ((config.num_frames - 1) // STRIDE_T + 1) * cells


def samplers(value):
    """Yield every sampler in a section, at any depth."""
    if isinstance(value, dict):
        if "steps" in value and "shift" in value:
            yield value
        for inner in value.values():
            yield from samplers(inner)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_shifts_are_those_of_the_clips_tokens(file):
    """mu is linear in the tokens, 0.95 at 1,024 and 2.05 at 4,096; the shift is e^mu."""
    run = yaml.safe_load(file.read_text())
    config = LTXPipelineConfig(**run["pipeline_config"])
    mu = 0.95 + (2.05 - 0.95) / (4096 - 1024) * (tokens(config) - 1024)
    specs = [*samplers(run["method_config"]), *samplers(run["validation"])]
    assert specs
    assert all(s["shift"] == pytest.approx(math.exp(mu), abs=1e-3) for s in specs)
    method = run["method_config"]
    assert method.get("score_shift", math.exp(mu)) == pytest.approx(math.exp(mu), abs=1e-3)
    assert method.get("time", {}).get("mean", mu) == pytest.approx(mu, abs=1e-3)
    assert run["validation"]["fps"] == config.frame_rate


def test_there_are_run_files():
    assert len(FILES) == 3
