"""Stock schedules of pipelines that give the scheduler their own sigmas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers.pipelines.ltx.pipeline_ltx import retrieve_timesteps
from distill_diffusers.sampling.scheduler import SchedulerGrid, UniformGrid, stock_schedule
from distill_protocols import DynamicShift, SamplerSpec

SPECS = [
    SamplerSpec(steps=1),
    SamplerSpec(steps=4, shift=3.0),
    SamplerSpec(steps=20),
    SamplerSpec(steps=8, shift=DynamicShift()).resolved(1500),
    SamplerSpec(steps=8, shift=DynamicShift(terminal=0.1)).resolved(300),
    SamplerSpec(steps=3, timesteps=(1000.0, 800.0, 400.0)),
]


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_ltx_pipeline_makes_the_samplers_timesteps(spec):
    """As ``LTXPipeline.__call__`` asks for them, mu included, which a static shift ignores."""
    schedule = stock_schedule(spec, UniformGrid())
    sigmas = np.linspace(1.0, 1 / spec.steps, spec.steps)
    timesteps: Any
    timesteps, steps = retrieve_timesteps(
        schedule.scheduler(), spec.steps, "cpu", None, sigmas=sigmas, mu=0.9
    )
    assert steps == spec.steps
    assert timesteps.tolist() == pytest.approx([1000 * s for s in spec.sigmas()], abs=2e-4)
    assert schedule.deviation <= 1.3e-4  # two steps of fp32 at 1000


@pytest.mark.parametrize("grid", [SchedulerGrid(), UniformGrid()])
def test_a_prediction_is_what_the_scheduler_makes(grid):
    spec = SamplerSpec(steps=5, timesteps=(1000.0, 900.0, 500.0, 300.0, 20.0))  # not met
    schedule = stock_schedule(spec, grid)
    config = schedule.config
    made = grid.sigmas(5, config["shift"], config["shift_terminal"])
    assert schedule.timesteps == pytest.approx([1000 * s for s in made], abs=1e-4)
    assert schedule.deviation > 1
