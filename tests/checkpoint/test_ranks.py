"""Several ranks save and resume as one."""

from __future__ import annotations

import time

import pytest
from distill_checkpoint import StoredCheckpoint
from distill_checkpoint.manifest import inspect
from ranks import together, train, train_and_lose_a_rank

REPLICATED, SHARDED = False, True


def different(a: dict[str, str], b: dict[str, str]) -> list[str]:
    assert isinstance(a, dict), a
    assert isinstance(b, dict), b
    return sorted(place for place in a.keys() | b.keys() if a.get(place) != b.get(place))


def of_rank(place: str) -> bool:
    return place.startswith(("/streams/tiny", "/global"))


@pytest.mark.parametrize("sharded", [REPLICATED, SHARDED])
@pytest.mark.parametrize("in_background", [False, True])
def test_two_ranks_go_on_bit_for_bit(tmp_path, sharded, in_background):
    whole = together(train, tmp_path / "whole", 5, sharded)
    config = {"async_save": in_background, "every_steps": 1}
    together(train, tmp_path / "out", 3, sharded, 0, config)
    resumed = together(train, tmp_path / "out", 5, sharded, 1, config)
    assert [different(a, b) for a, b in zip(whole, resumed, strict=True)] == [[], []]
    own = [place for place in different(*resumed) if of_rank(place)]
    assert [place for place in own if place.startswith("/streams")]  # each has its own generators
    assert "/global" in own
    shared = [p for p in resumed[0] if p.startswith("/streams/shared")]
    assert shared
    assert all(resumed[0][place] == resumed[1][place] for place in shared)
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        assert inspect(folder, checksums=True).damage is None


@pytest.mark.parametrize("sharded", [REPLICATED, SHARDED])
@pytest.mark.parametrize(("then", "now"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_reads_the_same_tensors(tmp_path, sharded, then, now):
    before = together(train, tmp_path, 3, sharded, size=then)
    after = together(train, tmp_path, 3, sharded, 1, size=now)
    for rank, found in enumerate(after):
        places = different(before[0], found)
        if rank == 0:  # the rank that was there then has its own generators too
            assert places == []
        else:
            assert places
            assert all(of_rank(place) for place in places)


def test_each_rank_writes_its_part(tmp_path):
    together(train, tmp_path, 4, SHARDED)
    folder = tmp_path / "checkpoint-000004"
    for below in ("roles/student/transformer", "optimizers/student.transformer"):
        sizes = [path.stat().st_size for path in (folder / below).glob("*.safetensors")]
        assert len(sizes) == 2
    # And whoever reads it needs to know nothing of ranks.
    weight = StoredCheckpoint.open(folder).weights("student")["transformer"]
    assert weight.read(["0.weight"])["0.weight"].shape == (6, 4)


@pytest.mark.parametrize(
    ("how", "config", "word"),
    [
        ("full", {}, "No space left on device"),
        ("full", {"async_save": True}, "No space left on device"),
        ("spoilt", {}, "inf in a shard"),
    ],
)
def test_what_one_rank_cannot_save_is_saved_by_none(tmp_path, how, config, word):
    said = together(train_and_lose_a_rank, tmp_path, SHARDED, how, config)
    assert said[0] == said[1]
    assert word in said[0]
    assert "rank 1" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000002"]
    assert isinstance(together(train, tmp_path, 4, SHARDED)[0], dict)


@pytest.mark.parametrize(
    ("how", "config"),
    [("kill", {}), ("kill", {"async_save": True}), ("stop", {"timeout_seconds": 10.0})],
)
def test_a_rank_that_dies_in_a_save_does_not_hold_up_the_other(tmp_path, how, config):
    began = time.monotonic()
    said = together(train_and_lose_a_rank, tmp_path, SHARDED, how, config)
    assert not said[1]
    assert "rank 0 lost the others" in said[0]
    assert time.monotonic() - began < 100  # far from the half hour of torch's own timeout
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000002"]
    whole = together(train, tmp_path / "whole", 4, SHARDED)
    resumed = together(train, tmp_path, 4, SHARDED, 1)
    assert [different(a, b) for a, b in zip(whole, resumed, strict=True)] == [[], []]
