"""Times at which roles of several experts can be called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from distill_methods import TimeSampling
from distill_methods.noise_sampler import NoiseSampler
from distill_protocols import ContractError, RandomStreams

HIGH, LOW = (875.0, 1000.0), (0.0, 875.0)
EARLY = TimeSampling(distribution="uniform", t_min=900.0, t_max=1000.0)


def sampler(*ranges: tuple[float, float]) -> NoiseSampler:
    experts = SimpleNamespace(expert_ranges=lambda *_: ranges)
    adapter: Any = SimpleNamespace(experts=experts)
    return NoiseSampler(adapter, RandomStreams(0))


def test_all_times_of_an_iteration_are_one_experts():
    whole = TimeSampling(distribution="uniform", t_min=0.0, t_max=1000.0)
    seen = set()
    for iteration in range(1, 41):
        times = sampler(LOW, HIGH).sample_timesteps("t", 4, iteration, whole, "student")
        seen.add(bool((times >= 875).all()))
        assert (times >= 875).all() or (times < 875).all()
    assert seen == {True, False}


def test_roles_that_share_no_time_are_refused():
    for iteration in (1, 2, 3):
        times = sampler(LOW, HIGH).sample_timesteps("t", 4, iteration, EARLY, "student")
        assert (times >= 900).all()
    for ranges in ((), ((0.0, 500.0),)):
        with pytest.raises(ContractError, match=r"student, critic can be called at t in .* no t"):
            sampler(*ranges).sample_range("t", 1, lambda _: 0.0, "student", "critic")
