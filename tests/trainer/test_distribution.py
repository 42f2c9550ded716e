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
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ranks import together
from spread import (
    Case,
    Outcome,
    all_trained,
    found_with,
    halves,
    in_a_script,
    launched,
    left_alone,
    lost,
    met,
    mixed_norms,
    poisoned,
    refused,
    swapped,
    waiting,
    with_streams_of,
)
from torch import Tensor, nn
from torch.distributed import TCPStore
from torch.distributed.tensor import DTensor
from toy_trainer import alternating, batches, training

CLOSE = {"rtol": 2e-5, "atol": 2e-6}
"""fp32 sums in another order, over five steps."""


@functools.cache
def alone(case: Case) -> Outcome:
    return all_trained([case.alone()])[0]


def same_as_alone(
    cases: list[Case], size: int, tolerance: Mapping[str, float] = CLOSE
) -> list[list[Outcome]]:
    """What came of each case on each rank, all of it compared with one process."""
    by_rank = together(all_trained, cases, size=size)
    for found in by_rank:
        assert isinstance(found, list), found
    for case, *found in zip(cases, *by_rank, strict=True):
        expected = alone(case)
        for i, loss in enumerate(expected.losses):
            mean = sum(outcome.losses[i] for outcome in found) / size
            assert mean == pytest.approx(loss, rel=tolerance["rtol"]), (case, i)
        for outcome in found:
            assert outcome.stepped == expected.stepped
            for now, then in zip(outcome.norms, expected.norms, strict=True):
                for name, norm in then.items():
                    assert math.isfinite(now[name]) == math.isfinite(norm), case
                    if math.isfinite(norm):
                        assert now[name] == pytest.approx(norm, rel=5 * tolerance["rtol"]), case
            for kind in ("weights", "averages"):
                mine, theirs = getattr(outcome, kind), getattr(expected, kind)
                assert mine.keys() == theirs.keys()
                for name, value in theirs.items():
                    numpy.testing.assert_allclose(
                        mine[name], value, **tolerance, err_msg=f"{name}, {case}"
                    )
            assert outcome.buffers == found[0].buffers
    return [list(found) for found in zip(*by_rank, strict=True)]


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
        (4, "fsdp2", None),
        (4, "hsdp", 2),
    ],
)
def test_all_numbers_are_those_of_one_process(
    size: int, strategy: str | None, shard_size: int | None
) -> None:
    cases = [evolve(case, strategy=strategy, shard_size=shard_size) for case in EACH]
    whole = strategy is None
    for found in same_as_alone(cases, size):
        assert found[0].sharded == (set() if whole else {"student", "critic", "teacher"})


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
    outcomes = [outcome for outcome, _ in same_as_alone(POLICIES, 2)]
    for outcome in outcomes:
        units = {"", "blocks.0", "blocks.1"} if "student" in outcome.sharded else set()
        assert outcome.units == units
    found = [outcome.sharded for outcome in outcomes]
    everything = {"student", "critic", "teacher"}
    assert found[5:8] == [{"critic", "teacher"}, {"student", "critic"}, {"teacher"}]
    assert all(sharded == everything for sharded in found[:5])


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
    same_as_alone(cases, 2)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "hsdp"])
def test_an_overflow_on_one_rank_leaves_the_step_out_on_all(strategy: str) -> None:
    # Sample 29 is of iteration 3, and rank 1's: its gradient is inf in fp16, its loss is not.
    case = evolve(Case(), precision="fp16", turns="both", max_norm=None, overflow=29)
    rounded = {"rtol": 5e-3, "atol": 1e-3}
    (found,) = same_as_alone([evolve(case, strategy=strategy)], 2, rounded)
    steps = [bool(stepped) for stepped in found[0].stepped]
    assert steps == [True, True, False, True, True]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_stop_between_micro_steps_leaves_nothing_of_the_iteration(strategy: str) -> None:
    # In the second micro step of iteration 3; gradients wait on each rank, whole, unseen.
    case = Case(accumulation=3, turns="both", stop_in_call=8, steps=3)
    (found,) = same_as_alone([evolve(case, strategy=strategy)], 2)
    assert len(found[0].losses) == 2 + 3, "the run was started again"


def test_one_process_may_be_sharded_too() -> None:
    case = evolve(Case(), strategy="fsdp2", accumulation=3, turns="both", adapters=True)
    same_as_alone([case, evolve(case, strategy="hsdp")], 1)


def test_a_script_that_brought_its_processes_together_needs_nothing_else(tmp_path: Path) -> None:
    found = together(in_a_script, str(tmp_path))
    expected = alone(evolve(Case(), accumulation=3, turns="both"))
    for outcome in found:
        assert isinstance(outcome, Outcome), outcome
        for name, value in expected.weights.items():
            numpy.testing.assert_allclose(outcome.weights[name], value, **CLOSE, err_msg=name)


@pytest.mark.parametrize("reshards", [True, False])
def test_an_average_is_swapped_in_and_out_bit_for_bit(reshards: bool) -> None:
    policy = FsdpPolicy(reshard_after_forward=reshards)
    case = evolve(Case(), strategy="fsdp2", student=policy, meta=True)
    for found in together(swapped, case):
        assert isinstance(found, dict), found
        assert not numpy.allclose(found["live"], found["mean"])
        assert numpy.array_equal(found["live"], found["again"])
        for name, value in found["before"].items():
            assert numpy.array_equal(found["after"][name], value), name


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
def test_processes_meet_by_torchruns_environment(
    case: Case, size: int, expected: dict[str, Any]
) -> None:
    for rank, found in enumerate(launched(met, case, size=size)):
        assert isinstance(found, dict), found
        assert found == {"rank": rank, "size": size, "device": "cpu", **expected}


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
def test_what_does_not_fit_is_an_error(
    case: Case, variables: dict[str, str], words: list[str]
) -> None:
    for message in launched(met, case, size=2, **variables):
        assert isinstance(message, str)
        assert "RankError" in message
        assert all(word in message for word in words), message


def test_processes_that_are_started_again_meet_in_the_store_that_knows_their_predecessors() -> None:
    """As torchrun's --max-restarts has it: the store is its own, and lives on."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for _ in range(3):
        found = launched(met, Case(timeout=20.0), size=2, **agent)
        assert [rank["rank"] for rank in found if isinstance(rank, dict)] == [0, 1], found


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


def test_who_does_not_come_is_not_waited_for_without_end() -> None:
    # The other one is not started.
    half = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    (message,) = launched(met, Case(timeout=2.0), size=1, **half)
    assert "RankError: rank 0 of 2 did not reach the others at 127.0.0.1" in message, message
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    (message,) = launched(
        met, Case(timeout=2.0), size=1, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", **agent
    )
    assert "within 2 s (no word of rank 1)" in message, message


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_rank_that_dies_in_a_step_ends_the_others(strategy: str) -> None:
    message = launched(lost, 1, size=2, STRATEGY=strategy)
    assert message[1] == ""
    assert "Error: " in message[0], message[0]


def test_a_rank_that_does_not_begin_is_not_waited_for(tmp_path: Path) -> None:
    (message, waited), _ = together(left_alone, str(tmp_path))
    assert message.startswith("RankError: rank 0 lost the others"), message
    assert waited < 50, "of a hundred"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_loss_that_one_rank_finds_infinite_ends_all_before_the_step(strategy: str) -> None:
    found = together(poisoned, evolve(Case(), strategy=strategy, accumulation=3), 27)
    # Sample 27 is row 3 of iteration 3: rank 1's, and so is the error.
    assert found[1][0].startswith("NonFiniteLossError: iteration 3: the loss is not finite")
    assert found[0][0].startswith("RankError: rank 1: iteration 3: the loss is not finite")
    assert all(finite for _, finite in found)


def test_ranks_with_the_same_streams_are_refused_together() -> None:
    first, second = together(with_streams_of, 0)
    assert second.startswith("ContractError: the run's RandomStreams are those of rank 0 of 2, but")
    assert "rank=1, world_size=2" in second
    assert first.startswith("RankError: rank 1: the run's RandomStreams"), first


def test_what_a_script_has_sharded_is_found_as_its_strategy_says() -> None:
    assert together(found_with, "fsdp2") == ["fsdp2"] * 2
    for message in together(found_with, "none"):
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
    found = together(refused)
    assert found[0] == found[1]
    for message, words in zip(
        found[0],
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
    from spread_wan import WanCase, all_trained

    half = WanCase(strategy="fsdp2", precision="bf16", mixed="bf16", checkpointing=True)
    cases = [
        WanCase(strategy=strategy, checkpointing=checkpointing, accumulation=accumulation)
        for strategy in ("ddp", "fsdp2", "hsdp")
        for checkpointing, accumulation in ((False, 1), (True, 3))
    ]
    by_rank = together(all_trained, [half, *cases])
    expected, rounded = all_trained([WanCase(), half.alone()])
    assert max(expected.norms[0].values()) > 0.2, "clipping is active"
    for found in by_rank:
        assert isinstance(found, list), found
    means = [sum(each) / 2 for each in zip(*(found[0].losses for found in by_rank), strict=True)]
    assert means == pytest.approx(rounded.losses, rel=0.02)
    for case, *found in zip([half, *cases], *by_rank, strict=True):
        if case is half:
            continue
        for i, loss in enumerate(expected.losses):
            mean = sum(outcome.losses[i] for outcome in found) / 2
            assert mean == pytest.approx(loss, rel=2e-5), (case, i)
        for name, value in expected.weights.items():
            numpy.testing.assert_allclose(
                found[0].weights[name], value, rtol=1e-4, atol=1e-5, err_msg=f"{name}, {case}"
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
    (first, last), (other, other_last) = together(waiting, case)
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
        expected, reached = halves(apart, accumulation)
        assert len(set(map(len, reached))) == 2, "a half, and all"
        for found, where in together(halves, apart, accumulation):
            assert where == reached
            for name, value in expected.weights.items():
                numpy.testing.assert_allclose(found.weights[name], value, **CLOSE, err_msg=name)


def test_a_norm_counts_parts_and_wholes_together() -> None:
    for norm, expected, clipped in together(mixed_norms):
        assert norm == pytest.approx(expected)
        assert math.hypot(*clipped) == pytest.approx(1, rel=1e-5)
