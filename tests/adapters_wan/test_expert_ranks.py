"""Two experts over two processes: who gets no gradient does not step, and the numbers are those of
one process."""

from __future__ import annotations

import numpy
import pytest
from expert_ranks import STEPS, ExpertCase, run_cases
from ranks import run_on_ranks

CASES = [
    ExpertCase(method=method, strategy=strategy, accumulation=accumulation)
    for method in ("finetune", "dmd2", "self_forcing")
    for strategy, accumulation in (("ddp", 2), ("fsdp2", 2))
]


@pytest.fixture(scope="module")
def spread(folder_of):
    """(case, the outcome of one process, those of two)."""
    folder = folder_of("t2v-experts")
    by_rank = run_on_ranks(run_cases, folder, CASES)
    for result in by_rank:
        assert isinstance(result, list), result
    alone = {case.alone(): None for case in CASES}
    alone = dict(zip(alone, run_cases(folder, list(alone)), strict=True))
    return [(case, alone[case.alone()], both) for case, *both in zip(CASES, *by_rank, strict=True)]


def test_an_expert_without_a_gradient_does_not_step(spread):
    for case, alone, both in spread:
        assert alone.stepped == both[0].stepped == both[1].stepped, case
        learning = {"student"} if case.method == "finetune" else {"student", "critic"}
        assert {key.split(".")[0] for keys in alone.stepped for key in keys} == learning
        for outcome in both:
            assert outcome.sharded == (case.strategy == "fsdp2")
            assert [set(keys) for keys in outcome.stepped] == [set(k) for k in outcome.reached], (
                case
            )
            assert outcome.schedules == outcome.updates == alone.updates
        for role in learning:
            each = [[k for k in keys if k.split(".")[0] == role] for keys in alone.stepped]
            assert max(map(len, each)) == 1, "one expert in each turn"
            assert len({key for keys in each for key in keys}) == 2, "and both have turns"
        assert len(alone.stepped) == STEPS


def test_ranks_make_the_same_calls(spread):
    """Length, chunks' exit steps and experts: or the ranks of a sharded model wait for ever."""
    for case, alone, both in spread:
        if case.method == "finetune":
            continue  # t is a sample's own
        assert both[0].calls == both[1].calls == alone.calls, case
        assert len({t for _, t in alone.calls}) > 2


def test_numbers_are_those_of_one_process(spread):
    for case, alone, both in spread:
        for name, value in alone.weights.items():
            for outcome in both:
                numpy.testing.assert_allclose(
                    outcome.weights[name], value, rtol=1e-3, atol=2e-5, err_msg=f"{name}, {case}"
                )
