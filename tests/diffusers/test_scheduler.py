"""Stock schedules of pipelines that give the scheduler their own sigmas."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.pipelines.ltx.pipeline_ltx import retrieve_timesteps
from distill_diffusers.sampling import sampler
from distill_diffusers.sampling.scheduler import (
    SchedulerGrid,
    UniformGrid,
    stock_schedule,
    unipc_scheduler,
)
from distill_protocols import ContractError, DynamicShift, SamplerSpec

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
    sigmas = grid.sigmas(5, config["shift"], config["shift_terminal"])
    assert schedule.timesteps == pytest.approx([1000 * s for s in sigmas], abs=1e-4)
    assert schedule.deviation > 1


# -- UniPC ----------------------------------------------------------------------------------------

WAN_SCHEDULER = {
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
"""scheduler/scheduler_config.json of the published Wan pipelines."""


def drift(x, t):
    """Return a velocity that depends on x and t as a model's does, so that solvers differ."""
    return torch.tanh(x) * (t / 1000).view(-1, 1, 1, 1, 1) + torch.sin(3 * x)


def draw(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 20, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0])
def test_unipc_is_the_scheduler_of_the_published_pipelines_bit_for_bit(steps, shift):
    theirs: Any = UniPCMultistepScheduler.from_config(WAN_SCHEDULER | {"flow_shift": shift})
    theirs.set_timesteps(steps, device="cpu")
    theirs.set_begin_index(0)
    x, seen = draw(), []
    for t in theirs.timesteps:
        x = theirs.step(drift(x, t.expand(2)), t, x, return_dict=False)[0]

    def velocity(x, t):
        seen.append(t)
        return drift(x, t)

    spec = SamplerSpec(steps=steps, shift=shift, solver="unipc")
    for _ in range(2):  # nothing stays of a clip
        seen.clear()
        assert torch.equal(sampler.sample(velocity, spec, draw()), x)
    assert [t.tolist() for t in seen] == [[float(t)] * 2 for t in theirs.timesteps]
    assert torch.equal(unipc_scheduler(spec).sigmas, theirs.sigmas)
    schedule = stock_schedule(spec)
    assert schedule.deviation == 0
    assert schedule.config["flow_shift"] == shift
    config = schedule.scheduler().config
    assert {key: config[key] for key in WAN_SCHEDULER} == WAN_SCHEDULER | {"flow_shift": shift}
    json.dumps(schedule.config)  # it is written to sampler_spec.json


def test_unipc_is_of_second_order():
    """Halving the step divides the error by four; Euler's by two."""
    fine, finer = (sampler.sample(drift, SamplerSpec(steps=n), draw()) for n in (1000, 2000))
    exact = 2 * finer - fine  # Richardson: without Euler's own error of first order

    def error(solver, steps):
        clip = sampler.sample(drift, SamplerSpec(steps=steps, solver=solver), draw())
        return float((clip - exact).square().mean().sqrt())

    # With more steps the whole times of diffusers are what is left of the error.
    assert error("unipc", 10) < error("unipc", 5) / 4
    assert error("euler", 10) > error("euler", 5) / 2.5
    assert error("unipc", 10) < error("euler", 10) / 5


UNIPC_SPECS = [
    (SamplerSpec(steps=1, solver="unipc"), 0),
    (SamplerSpec(steps=2, shift=3.0, solver="unipc"), 0),
    (SamplerSpec(steps=8, shift=5.0, solver="unipc"), 2e-4),
    (SamplerSpec(steps=8, shift=DynamicShift(terminal=0.1), solver="unipc").resolved(300), 2e-4),
    (SamplerSpec(steps=3, timesteps=(1000.0, 800.5, 400.0), solver="unipc"), 2e-4),
]


@pytest.mark.parametrize(("spec", "most"), UNIPC_SPECS, ids=range(len(UNIPC_SPECS)))
def test_ltx_pipeline_walks_by_unipc_too(spec, most):
    schedule = stock_schedule(spec, UniformGrid())
    scheduler: Any = schedule.scheduler()
    sigmas = np.linspace(1.0, 1 / spec.steps, spec.steps)
    retrieve_timesteps(scheduler, spec.steps, "cpu", None, sigmas=sigmas, mu=0.9)
    own = unipc_scheduler(spec)
    assert scheduler.sigmas.tolist() == pytest.approx(own.sigmas.tolist(), abs=most / 1000)
    assert schedule.deviation <= most
    assert list(schedule.sampler_timesteps) == own.timesteps.tolist()


def test_times_that_no_shift_makes_are_measured():
    spec = SamplerSpec(steps=5, timesteps=(1000.0, 900.0, 500.0, 300.0, 20.0), solver="unipc")
    schedule = stock_schedule(spec)
    assert schedule.deviation > 1
    assert schedule.timesteps != schedule.sampler_timesteps == (999, 900, 500, 300, 20)


def test_unipc_cannot_be_left_early():
    spec = SamplerSpec(steps=3, solver="unipc")
    for options in ({"exit_step": 1}, {"exit_step": 2}, {"requires_grad": True}):
        with pytest.raises(ContractError, match="unipc"):
            sampler.sample(drift, spec, draw(), **options)
    assert not sampler.sample(drift, spec, draw().requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"solver": "dpm"}, "solver"),
        ({"solver": "unipc", "stochastic": True}, "fresh noise"),
        ({"solver": "unipc", "timesteps": (1000.0, 999.9995)}, "the second time, 999.9995, must"),
        ({"solver": "unipc", "shift": 1e7}, "must be below"),
    ],
)
def test_samplers_that_no_solver_walks(values, message):
    with pytest.raises(ValueError, match=message):
        SamplerSpec(steps=2, **values)
