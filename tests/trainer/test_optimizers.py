"""Optimizers and schedules."""

from __future__ import annotations

import math

import pytest
from distill_protocols import ContractError, ModelBundle, RoleError
from distill_trainer import OptimizerConfig, ScheduleConfig, build_optimizers, schedule_factor
from hypothesis import given
from hypothesis import strategies as st
from toy_trainer import Alternating, linear_role


@given(warmup=st.integers(0, 10), rest=st.integers(1, 40), final=st.floats(0, 1), data=st.data())
def test_schedules_follow_their_closed_forms(
    warmup: int, rest: int, final: float, data: st.DataObject
) -> None:
    done = data.draw(st.integers(0, warmup + rest + 5))
    horizon = warmup + rest
    cosine = ScheduleConfig(name="cosine", warmup_steps=warmup, final_ratio=final)
    linear = ScheduleConfig(name="linear", warmup_steps=warmup, final_ratio=final)
    constant = ScheduleConfig(warmup_steps=warmup)
    if done < warmup:
        expected = [(done + 1) / (warmup + 1)] * 3
    else:
        p = min(1, (done - warmup) / rest)
        expected = [
            final + (1 - final) * 0.5 * (1 + math.cos(p * math.pi)),
            1 - p * (1 - final),
            1.0,
        ]
    actual = [schedule_factor(config, done, horizon) for config in (cosine, linear, constant)]
    assert actual == pytest.approx(expected)


@given(warmup=st.integers(0, 10), horizon=st.integers(1, 40))
def test_the_rate_rises_to_full_then_falls_to_the_final_ratio(warmup: int, horizon: int) -> None:
    config = ScheduleConfig(name="cosine", warmup_steps=warmup, final_ratio=0.1)
    values = [schedule_factor(config, done, horizon) for done in range(warmup + horizon + 2)]
    peak = warmup
    assert values[peak] == pytest.approx(1.0)
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert values[0] > 0, "a first step of rate 0 would be a wasted one"
    assert values[max(horizon, warmup + 1)] == pytest.approx(0.1)


def test_one_optimizer_a_module_fused_except_under_fp16() -> None:
    role = linear_role("student")
    role.modules["second"] = linear_role("other").modules["net"]
    build_optimizers(role, OptimizerConfig(lr=3e-4, betas=(0.0, 0.9)), horizon=5)
    assert set(role.optimizers) == set(role.schedulers) == {"net", "second"}
    group = role.optimizers["net"].param_groups[0]
    assert (group["lr"], group["betas"], group["fused"]) == (3e-4, (0.0, 0.9), True)
    parameter_ids = {id(p) for p in group["params"]}
    assert parameter_ids == {id(p) for p in role.modules["net"].parameters()}

    half = linear_role("student", precision="fp16")
    build_optimizers(half, OptimizerConfig(), horizon=5)
    assert not half.optimizers["net"].param_groups[0]["fused"]
    with pytest.raises(ContractError, match="fp16"):
        build_optimizers(half, OptimizerConfig(fused=True), horizon=5)


def test_a_run_with_one_fp16_role_fuses_none() -> None:
    student, critic = linear_role("student", precision="fp16"), linear_role("critic")
    for role in (student, critic):
        build_optimizers(role, OptimizerConfig(), horizon=5, scaled=True)
    bundle = ModelBundle({"student": student, "critic": critic})
    assert Alternating(bundle, 2).grad_scaler.is_enabled()  # refuses fused optimizers
    with pytest.raises(ContractError, match=r"'critic'.*fp16"):
        build_optimizers(critic, OptimizerConfig(fused=True), horizon=5, scaled=True)


def test_a_frozen_role_gets_none() -> None:
    with pytest.raises(RoleError, match="frozen"):
        build_optimizers(linear_role("teacher", trainable=False), OptimizerConfig(), horizon=5)
