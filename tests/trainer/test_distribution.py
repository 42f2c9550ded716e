"""One, two and four processes give the same numbers at the same global batch."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy
import pytest
import torch
from attrs import evolve
from distill_protocols import FsdpPolicy, RoleError, RoleHandle
from distill_trainer import DistillTrainer, DistributedConfig, Distribution
from distribution_ranks import (
    Case,
    Outcome,
    adopt_strategy,
    call_with_average,
    clip_mixed_gradients,
    describe_distribution,
    error_of_streams,
    gradients_of_micro_steps,
    launch,
    policy_errors,
    run_cases,
    train_and_kill_rank,
    train_in_script,
    train_on_nan,
    train_partial_gradients,
    train_without_other_rank,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.distributed.tensor import DTensor
from toy_trainer import alternating, batches, training

CLOSE = {"rtol": 2e-5, "atol": 2e-6}
"""fp32 sums in another order, over five steps."""


@functools.cache
def expected_outcome(case: Case) -> Outcome:
    return run_cases([case.in_one_process()])[0]


def compare_with_one_process(
    cases: list[Case], size: int, tolerance: Mapping[str, float] = CLOSE
) -> list[list[Outcome]]:
    """Train each case on each rank, compare all numbers with one process, return the outcomes."""
    by_rank = run_on_ranks(run_cases, cases, size=size)
    for result in by_rank:
        assert isinstance(result, list), result
    for case, *outcomes in zip(cases, *by_rank, strict=True):
        expected = expected_outcome(case)
        for i, loss in enumerate(expected.losses):
            mean = sum(outcome.losses[i] for outcome in outcomes) / size
            assert mean == pytest.approx(loss, rel=tolerance["rtol"]), (case, i)
        for outcome in outcomes:
            assert outcome.stepped == expected.stepped
            for norms, expected_norms in zip(outcome.norms, expected.norms, strict=True):
                for name, norm in expected_norms.items():
                    assert math.isfinite(norms[name]) == math.isfinite(norm), case
                    if math.isfinite(norm):
                        assert norms[name] == pytest.approx(norm, rel=5 * tolerance["rtol"]), case
            for kind in ("weights", "averages"):
                actual, reference = getattr(outcome, kind), getattr(expected, kind)
                assert actual.keys() == reference.keys()
                for name, value in reference.items():
                    numpy.testing.assert_allclose(
                        actual[name], value, **tolerance, err_msg=f"{name}, {case}"
                    )
            assert outcome.buffers == outcomes[0].buffers
    return [list(outcomes) for outcomes in zip(*by_rank, strict=True)]


EACH = [
    evolve(Case(), accumulation=accumulation, turns=turns, adapters=adapters)
    for accumulation, turns, adapters in [
        (1, "alternate", False),
        (3, "alternate", False),
        (1, "both", False),
        (3, "both", True),
        (1, "alternate", True),
        (3, "experts", False),
        (1, "experts", True),  # one of them takes no gradient at all, on any rank
    ]
]


@pytest.mark.parametrize(
    ("size", "strategy", "shard_size"),
    [
        (2, None, None),
        (2, "fsdp2", None),
        pytest.param(4, "fsdp2", None, marks=pytest.mark.slow),
        (4, "hsdp", 2),
    ],
)
def test_all_numbers_are_those_of_one_process(
    size: int, strategy: str | None, shard_size: int | None
) -> None:
    cases = [evolve(case, strategy=strategy, shard_size=shard_size) for case in EACH]
    unsharded = strategy is None
    for outcomes in compare_with_one_process(cases, size):
        assert outcomes[0].sharded == (set() if unsharded else {"student", "critic", "teacher"})


WIDE = FsdpPolicy(reshard_after_forward=False)

POLICIES = [
    # Parameters on meta, filled when they are parts.
    evolve(Case(), strategy="fsdp2", meta=True, accumulation=3, turns="both"),
    # Gathered weights stay until the backward pass: nothing may be read from them in between.
    evolve(
        Case(),
        strategy="fsdp2",
        student=WIDE,
        critic=WIDE,
        teacher=WIDE,
        turns="both",
        accumulation=3,
    ),
    evolve(Case(), strategy="fsdp2", student=WIDE, critic=WIDE, teacher=WIDE, adapters=True),
    evolve(Case(), strategy="fsdp2", sync_every_micro_step=True, accumulation=3, turns="experts"),
    evolve(Case(), strategy="hsdp", shard_size=1, sync_every_micro_step=True, accumulation=3),
    # A trained role that stays whole beside sharded ones, and a frozen one that is sharded alone.
    evolve(Case(), strategy="fsdp2", student=FsdpPolicy(shard=False), accumulation=3, turns="both"),
    evolve(Case(), strategy="fsdp2", teacher=FsdpPolicy(shard=False)),
    evolve(Case(), strategy="ddp", teacher=FsdpPolicy(), accumulation=3, turns="both"),
    # The only block list, named by hand; everything waits in host memory.
    evolve(Case(), strategy="fsdp2", student=FsdpPolicy(blocks=("blocks",)), steps=2),
    evolve(Case(), strategy="fsdp2", student=FsdpPolicy(cpu_offload=True)),
    evolve(Case(), strategy="ddp", name="sgd", turns="both", max_norm=None),
]


def test_policies_change_no_number() -> None:
    outcomes = [outcome for outcome, _ in compare_with_one_process(POLICIES, 2)]
    for outcome in outcomes:
        units = {"", "blocks.0", "blocks.1"} if "student" in outcome.sharded else set()
        assert outcome.units == units
        assert bool(outcome.measured) == (not outcome.sharded), "no gradients of single losses"
    sharded = [outcome.sharded for outcome in outcomes]
    everything = {"student", "critic", "teacher"}
    assert sharded[5:8] == [{"critic", "teacher"}, {"student", "critic"}, {"teacher"}]
    assert all(roles == everything for roles in sharded[:5])


_ANY = st.builds(
    Case,
    strategy=st.sampled_from(["ddp", "fsdp2", "hsdp"]),
    student=st.sampled_from([None, FsdpPolicy(shard=False)]),
    sync_every_micro_step=st.booleans(),
    meta=st.booleans(),
    accumulation=st.sampled_from([1, 2, 3]),
    turns=st.sampled_from(["alternate", "both", "experts"]),
    adapters=st.booleans(),
    max_norm=st.sampled_from([None, 0.1, 10.0]),
    steps=st.integers(2, 4),
)


@settings(max_examples=1, phases=[Phase.generate])
@given(st.lists(_ANY, min_size=8, max_size=8))  # one pair of processes for all of them
def test_any_combination_gives_the_numbers_of_one_process(cases: list[Case]) -> None:
    compare_with_one_process(cases, 2)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "hsdp"])
def test_an_overflow_on_one_rank_leaves_the_step_out_on_all(strategy: str) -> None:
    # Sample 29 is of iteration 3, and rank 1's: its gradient is inf in fp16, its loss is not.
    case = evolve(Case(), precision="fp16", turns="both", max_norm=None, overflow=29)
    rounded = {"rtol": 5e-3, "atol": 1e-3}
    (outcomes,) = compare_with_one_process([evolve(case, strategy=strategy)], 2, rounded)
    steps = [bool(stepped) for stepped in outcomes[0].stepped]
    assert steps == [True, True, False, True, True]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_stop_between_micro_steps_leaves_nothing_of_the_iteration(strategy: str) -> None:
    # In the second micro step of iteration 3; gradients wait on each rank, whole, unseen.
    case = Case(accumulation=3, turns="both", stop_in_call=8, steps=3)
    (outcomes,) = compare_with_one_process([evolve(case, strategy=strategy)], 2)
    assert len(outcomes[0].losses) == 2 + 3, "the run was started again"


def test_one_process_may_be_sharded_too() -> None:
    case = evolve(Case(), strategy="fsdp2", accumulation=3, turns="both", adapters=True)
    compare_with_one_process([case, evolve(case, strategy="hsdp")], 1)


def test_a_script_that_initialised_its_process_group_needs_nothing_else(tmp_path: Path) -> None:
    outcomes = run_on_ranks(train_in_script, str(tmp_path))
    expected = expected_outcome(evolve(Case(), accumulation=3, turns="both"))
    for outcome in outcomes:
        assert isinstance(outcome, Outcome), outcome
        for name, value in expected.weights.items():
            numpy.testing.assert_allclose(outcome.weights[name], value, **CLOSE, err_msg=name)


@pytest.mark.parametrize("reshards", [True, False])
def test_an_average_is_swapped_in_and_out_bit_for_bit(reshards: bool) -> None:
    policy = FsdpPolicy(reshard_after_forward=reshards)
    case = evolve(Case(), strategy="fsdp2", student=policy, meta=True)
    for outputs in run_on_ranks(call_with_average, case):
        assert isinstance(outputs, dict), outputs
        assert not numpy.allclose(outputs["live"], outputs["mean"])
        assert numpy.array_equal(outputs["live"], outputs["again"])
        for name, value in outputs["before"].items():
            assert numpy.array_equal(outputs["after"][name], value), name


@pytest.mark.parametrize(
    ("case", "size", "expected"),
    [
        (Case(), 2, {"strategy": "ddp", "mesh": (2,)}),
        (Case(), 1, {"strategy": "none", "mesh": None}),
        (Case(strategy="fsdp2"), 1, {"strategy": "fsdp2", "mesh": (1,)}),
        (Case(strategy="hsdp"), 2, {"strategy": "hsdp", "mesh": (1, 2)}),
        (Case(strategy="hsdp", shard_size=1), 2, {"strategy": "hsdp", "mesh": (2, 1)}),
    ],
)
def test_processes_connect_by_torchruns_variables(
    case: Case, size: int, expected: dict[str, Any]
) -> None:
    for rank, description in enumerate(launch(describe_distribution, case, size=size)):
        assert isinstance(description, dict), description
        assert description == {"rank": rank, "size": size, "device": "cpu", **expected}


@pytest.mark.parametrize(
    ("case", "variables", "words"),
    [
        (Case(strategy="none"), {}, ["strategy is none with 2 processes", "ddp, fsdp2 or hsdp"]),
        (
            Case(strategy="hsdp", shard_size=3),
            {},
            ["2 processes / 3 a group", "= 0.667 groups", "a shard_size of 1 or 2"],
        ),
        (Case(), {"MASTER_PORT": "x"}, ["MASTER_PORT='x'", "torchrun"]),
    ],
)
def test_a_strategy_that_does_not_fit_the_processes_is_an_error(
    case: Case, variables: dict[str, str], words: list[str]
) -> None:
    for message in launch(describe_distribution, case, size=2, **variables):
        assert isinstance(message, str)
        assert "RankError" in message
        assert all(word in message for word in words), message


def test_restarted_processes_connect_through_torchruns_old_store() -> None:
    """As torchrun's --max-restarts has it: the store is its own, and lives on."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for _ in range(3):
        descriptions = launch(describe_distribution, Case(timeout=20.0), size=2, **agent)
        assert [rank["rank"] for rank in descriptions if isinstance(rank, dict)] == [0, 1], (
            descriptions
        )


def test_a_model_that_returns_a_view_may_be_sharded() -> None:
    """Else torch warns of it in each process, and an in-place operation would lose gradients."""

    class Reshaped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).view(-1)

    with Distribution.start(DistributedConfig(strategy="fsdp2"), "cpu") as distribution:
        role = RoleHandle(name="student", modules={"net": Reshaped(3, 3)}, trainable=True)
        distribution.shard(role)
        net = role.modules["net"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = net(torch.ones(2, 3))
        out += 1
        out.sum().backward()
        for parameter in net.parameters():
            assert isinstance(parameter.grad, DTensor)
            assert (parameter.grad.full_tensor() == 2).all()


def test_a_process_that_does_not_connect_times_out() -> None:
    # The other one is not started.
    half = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    (message,) = launch(describe_distribution, Case(timeout=2.0), size=1, **half)
    assert "RankError: rank 0 of 2 did not reach the others at 127.0.0.1" in message, message
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    (message,) = launch(
        describe_distribution,
        Case(timeout=2.0),
        size=1,
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        **agent,
    )
    assert "within 2 s (no word of rank 1)" in message, message


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_rank_that_dies_in_a_step_ends_the_others(strategy: str) -> None:
    message = launch(train_and_kill_rank, 1, size=2, STRATEGY=strategy)
    assert message[1] == ""
    assert "Error: " in message[0], message[0]


def test_the_others_end_if_a_rank_does_not_begin(tmp_path: Path) -> None:
    (message, waited), _ = run_on_ranks(train_without_other_rank, str(tmp_path))
    assert message.startswith("RankError: rank 0 lost the others"), message
    assert waited < 50, "of a hundred"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_an_infinite_loss_on_one_rank_ends_all_before_the_step(strategy: str) -> None:
    results = run_on_ranks(train_on_nan, evolve(Case(), strategy=strategy, accumulation=3), 27)
    # Sample 27 is row 3 of iteration 3: rank 1's, and so is the error.
    assert results[1][0].startswith("NonFiniteLossError: iteration 3: the loss is not finite")
    assert results[0][0].startswith("RankError: rank 1: iteration 3: the loss is not finite")
    assert all(finite for _, finite in results)


def test_ranks_with_the_same_streams_are_refused_together() -> None:
    first, second = run_on_ranks(error_of_streams, 0)
    assert second.startswith("ContractError: the run's RandomStreams are those of rank 0 of 2, but")
    assert "rank=1, world_size=2" in second
    assert first.startswith("RankError: rank 1: the run's RandomStreams"), first


def test_the_strategy_of_roles_sharded_by_a_script_is_recognised() -> None:
    assert run_on_ranks(adopt_strategy, "fsdp2") == ["fsdp2"] * 2
    for message in run_on_ranks(adopt_strategy, "none"):
        assert message.startswith("RankError: the strategy is none with 2 processes")


@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp"])
def test_a_strategy_that_shards_is_refused_where_nothing_is_sharded(
    tmp_path: Path, strategy: Literal["fsdp2", "hsdp"]
) -> None:
    config = training(tmp_path / "out", 1, distributed=DistributedConfig(strategy=strategy))
    with pytest.raises(RoleError, match=rf"strategy is {strategy}, but no weights are sharded"):
        DistillTrainer(config).run(alternating(), batches())
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_does_not_fit_is_an_error() -> None:
    messages = run_on_ranks(policy_errors)
    assert messages[0] == messages[1]
    for message, words in zip(
        messages[0],
        [
            ["role 'student' is trained", "under the strategy ddp", "fsdp2"],
            ["'blokcs', which must be a module list of net (Net)", "it has: blocks"],
            ["mixed_precision bf16 must be the role's precision (fp32)"],
            ["has optimizers (net)", "Distribution.shard first"],
            ["role 'teacher' has offload=True", "cpu_offload=True", "shard=False"],
        ],
        strict=True,
    ):
        assert all(word in message for word in words), message


def test_a_real_wan_with_and_without_activation_checkpointing() -> None:
    from wan_distribution_ranks import WanCase, run_cases

    half = WanCase(strategy="fsdp2", precision="bf16", mixed="bf16", checkpointing=True)
    cases = [
        WanCase(strategy=strategy, checkpointing=checkpointing, accumulation=accumulation)
        for strategy in ("ddp", "fsdp2", "hsdp")
        for checkpointing, accumulation in ((False, 1), (True, 3))
    ]
    by_rank = run_on_ranks(run_cases, [half, *cases])
    expected, rounded = run_cases([WanCase(), half.in_one_process()])
    assert max(expected.norms[0].values()) > 0.2, "clipping is active"
    for result in by_rank:
        assert isinstance(result, list), result
    means = [sum(each) / 2 for each in zip(*(result[0].losses for result in by_rank), strict=True)]
    assert means == pytest.approx(rounded.losses, rel=0.02)
    for case, *outcomes in zip([half, *cases], *by_rank, strict=True):
        if case is half:
            continue
        for i, loss in enumerate(expected.losses):
            mean = sum(outcome.losses[i] for outcome in outcomes) / 2
            assert mean == pytest.approx(loss, rel=2e-5), (case, i)
        for name, value in expected.weights.items():
            numpy.testing.assert_allclose(
                outcomes[0].weights[name], value, rtol=1e-4, atol=1e-5, err_msg=f"{name}, {case}"
            )


@pytest.mark.parametrize(
    ("case", "waits"),
    [
        (Case(strategy="ddp"), True),
        (Case(strategy="fsdp2"), True),
        (Case(strategy="fsdp2", sync_every_micro_step=True), False),
    ],
)
def test_gradients_are_averaged_in_the_last_micro_step_only(case: Case, waits: bool) -> None:
    (first, last), (other, other_last) = run_on_ranks(gradients_of_micro_steps, case)
    assert last
    assert last == other_last, "averaged"
    if not waits:
        assert first == other
        assert first != []
    elif case.strategy == "ddp":
        assert first != other, "each rank's own"
    else:
        assert first == other == [], "whole and unseen, beside the parts"


@pytest.mark.parametrize("apart", [False, True])
def test_weights_that_only_other_turns_reach_keep_no_gradient(apart: bool) -> None:
    for accumulation in (1, 3):
        expected, reached = train_partial_gradients(apart, accumulation)
        assert len(set(map(len, reached))) == 2, "a half, and all"
        for outcome, reached_on_rank in run_on_ranks(train_partial_gradients, apart, accumulation):
            assert reached_on_rank == reached
            for name, value in expected.weights.items():
                numpy.testing.assert_allclose(outcome.weights[name], value, **CLOSE, err_msg=name)


def test_a_norm_counts_parts_and_wholes_together() -> None:
    for norm, expected, clipped in run_on_ranks(clip_mixed_gradients):
        assert norm == pytest.approx(expected)
        assert math.hypot(*clipped) == pytest.approx(1, rel=1e-5)
