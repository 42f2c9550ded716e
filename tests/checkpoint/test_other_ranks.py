"""A run that goes on with other ranks and strategies: same data, same noise, same numbers."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rank_rows import Link, Seen, go_on
from ranks import run_on_ranks
from toy_data import write_dataset

STARTS = [
    ("ddp", 1), ("fsdp2", 1), ("ddp", 2), ("fsdp2", 2), ("offload", 2), ("ddp", 4), ("fsdp2", 4),
    ("hsdp", 4),
]  # fmt: skip
LINKS = 3


def links(folder: Path, data: Path, path: list[tuple[str, int]]) -> list[list[Link]]:
    results = [run_on_ranks(go_on, folder, data, strategy, size=size) for strategy, size in path]
    for ranks in results:
        assert all(isinstance(link, Link) for link in ranks), ranks
    return results


def seen(ranks: list[Link]) -> list[Seen]:
    return sorted(row for link in ranks for row in link.seen)


def of_all(places: dict[str, str]) -> dict[str, str]:
    """Without the generators that each rank has for itself."""
    return {p: v for p, v in places.items() if not p.startswith(("/streams/rows.own", "/global"))}


@pytest.fixture(scope="module")
def data(_folders_in_memory):
    with TemporaryDirectory() as folder:
        # Not a multiple of the global batch: epochs end within one.
        yield write_dataset(Path(folder) / "data", 11)


@pytest.fixture(scope="module")
def train_uninterrupted(data) -> list[list[Link]]:
    """Train in one process that never stops."""
    with TemporaryDirectory() as folder:
        return links(Path(folder), data, [("ddp", 1)] * LINKS)


@example(path=[("ddp", 2), ("ddp", 1), ("ddp", 2)])
@example(path=[("hsdp", 4), ("fsdp2", 1), ("fsdp2", 2)])
@settings(max_examples=1)
@given(path=st.lists(st.sampled_from(STARTS), min_size=LINKS, max_size=LINKS))
def test_it_goes_on_with_the_same_samples_noise_and_state(train_uninterrupted, data, path):
    with TemporaryDirectory() as folder:
        results = links(Path(folder), data, path)
    for ranks, expected, former in zip(
        results, train_uninterrupted, [None, *results], strict=False
    ):
        assert seen(ranks) == seen(expected)
        if former is not None:
            for link in ranks:
                assert of_all(link.began) == of_all(former[0].ended)
        for link in ranks:
            for name, value in expected[0].weights.items():
                assert link.weights[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
