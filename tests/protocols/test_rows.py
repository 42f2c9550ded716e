"""What a sample draws is a function of seed, purpose and place; and work spread by rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from distill_conditioning.order import rank_positions
from distill_protocols import RandomStreams, RowGenerators, derive_seed
from distill_runtime import ALONE, Ranks, RowPartition
from hypothesis import given
from hypothesis import strategies as st

seeds = st.integers(0, 2**40)
purposes = st.sampled_from(["dmd2.critic.t", "rollout.1", "", "rows/shared/x"])
shapes = st.lists(st.integers(1, 4), max_size=3)


class Cut(NamedTuple):
    """One way to go through some samples: micro steps, of so many samples a rank."""

    ranks: int
    batch: int


cuts = st.builds(Cut, ranks=st.integers(1, 4), batch=st.integers(1, 4))


def draw_rows(streams: list[RandomStreams], cut: Cut, micro_steps: int, *, purpose: str = "t"):
    """Return what the ranks of ``cut`` draw in further micro steps, in the order of the data."""
    rows: list[torch.Tensor] = []
    for _ in range(micro_steps):
        rows += [torch.empty(0)] * cut.ranks * cut.batch
        for rank, own in enumerate(streams):
            values = own.rows(purpose, cut.batch).normal([2])
            start = len(rows) - cut.ranks * cut.batch
            for place, value in zip(
                rank_positions(start, cut.batch, rank, cut.ranks), values, strict=True
            ):
                rows[place] = value
    return rows


def ranks_of(seed: int, cut: Cut) -> list[RandomStreams]:
    return [RandomStreams(seed, rank=r, world_size=cut.ranks) for r in range(cut.ranks)]


@given(seeds, purposes, st.lists(st.integers(0, 2**40), min_size=1, max_size=5), shapes)
def test_a_row_is_a_generator_of_its_own(seed, purpose, rows, shape):
    generators = RowGenerators.seeded(seed, purpose, rows)
    again = [torch.Generator().manual_seed(derive_seed(seed, purpose, row)) for row in rows]
    assert len(generators) == len(rows)
    for draw, alone in (
        (lambda: generators.normal(shape), lambda g: torch.randn(shape, generator=g)),
        (lambda: generators.uniform(shape), lambda g: torch.rand(shape, generator=g)),
        (lambda: generators.integers(7), lambda g: torch.randint(7, (), generator=g)),
        (generators.normal, lambda g: torch.randn((), generator=g)),
    ):
        assert torch.equal(draw(), torch.stack([alone(g) for g in again]))


@given(seeds, cuts, st.integers(1, 3))
def test_any_division_of_the_samples_draws_the_same(seed: int, cut: Cut, micro_steps: int):
    full = Cut(ranks=1, batch=cut.ranks * cut.batch * micro_steps)
    expected = draw_rows(ranks_of(seed, full), full, 1)
    actual = draw_rows(ranks_of(seed, cut), cut, micro_steps)
    assert all(map(torch.equal, actual, expected))
    assert len({tuple(row.tolist()) for row in actual}) == len(actual)


@given(seeds, cuts, cuts, st.integers(0, 3), st.booleans())
def test_another_number_of_ranks_goes_on_with_the_same_numbers(seed, cut, other, before, seen):
    """And so does a rank that was not there, which has only what all ranks have alike."""
    straight = RandomStreams(seed)
    count = before * cut.ranks * cut.batch
    straight.rows("t", count)
    expected = draw_rows([straight], Cut(1, other.ranks * other.batch), 1)
    first, second = ranks_of(seed, cut), ranks_of(seed, other)
    draw_rows(first, cut, before)
    for own in second:
        draw_rows([own], Cut(1, 3), 2)  # what it drew before it was loaded is nothing
        own.load_state_dict(first[-1].state_dict(), shared_only=seen)
    actual = draw_rows(second, other, 1)
    assert all(map(torch.equal, actual, expected))


@given(seeds, cuts)
def test_purposes_count_their_rows_apart_and_leave_generators_alone(seed: int, cut: Cut):
    one, both = RandomStreams(seed), RandomStreams(seed)
    draw_rows([both], cut._replace(ranks=1), 2, purpose="other")
    state = both.get("t").get_state()
    assert torch.equal(one.rows("t", 2).normal(), both.rows("t", 2).normal())
    assert torch.equal(both.get("t").get_state(), state)
    before = torch.get_rng_state()
    draw_rows([both], cut._replace(ranks=1), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_state_holds_counts_and_generators_and_no_more():
    streams = RandomStreams(1, rank=1, world_size=4)
    streams.rows("t", 3)
    streams.rows("t", 2)
    streams.get("k", shared=True)
    state = streams.state_dict()
    assert state.keys() == {"rows/t", "shared/k"}
    assert state["rows/t"].tolist() == 20
    fresh = RandomStreams(1, rank=1, world_size=4)
    fresh.load_state_dict(state)
    assert fresh.state_dict().keys() == state.keys()


@given(st.integers(1, 40), st.integers(1, 9))
def test_a_row_partition_has_each_row_once_and_equal_shares(count, size):
    parts = [RowPartition(Ranks(rank=r, size=size), count).own for r in range(size)]
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) == -(-count // size)
    joined = [row for part in parts for row in part]
    assert joined[:count] == list(range(count))
    assert set(joined[count:]) <= {count - 1}


@given(st.integers(1, 5))
def test_one_process_gathers_what_it_has(count: int):
    spread = RowPartition(ALONE, count)
    rows = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    assert spread.own == list(range(count))
    assert torch.equal(spread.gather(rows), rows)
