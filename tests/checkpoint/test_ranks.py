"""Several ranks save and resume as one."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from distill_checkpoint import StoredCheckpoint
from distill_checkpoint.manifest import inspect
from rank_jobs import keep, save_after_a_look, save_at
from ranks import ADAPTERS, PLAIN, run_on_ranks, train, train_and_lose_a_rank
from safetensors import safe_open


def different(a: dict[str, str], b: dict[str, str]) -> list[str]:
    assert isinstance(a, dict), a
    assert isinstance(b, dict), b
    return sorted(place for place in a.keys() | b.keys() if a.get(place) != b.get(place))


@functools.cache
def uninterrupted(strategy: str, size: int) -> list[dict[str, str]]:
    with TemporaryDirectory() as folder:
        return run_on_ranks(train, Path(folder), 4, strategy, size=size)


def assert_same_end(results: list[dict[str, str]], strategy: str) -> None:
    """Assert that every rank ended as in a run that never stopped, bit for bit."""
    full = uninterrupted(strategy, len(results))
    assert [different(a, b) for a, b in zip(full, results, strict=True)] == [[]] * len(results)


def of_rank(place: str) -> bool:
    return place.startswith(("/streams/tiny", "/global"))


@pytest.mark.parametrize(
    ("strategy", "size", "in_background"),
    [("ddp", 2, True), ("fsdp2", 2, False), ("hsdp", 4, True)],
)
def test_ranks_go_on_bit_for_bit(tmp_path, strategy, size, in_background):
    config = {"async_save": in_background, "every_steps": 1}
    run_on_ranks(train, tmp_path, 2, strategy, 0, config, size=size)
    resumed = run_on_ranks(train, tmp_path, 4, strategy, 1, config, size=size)
    assert_same_end(resumed, strategy)
    own = [place for place in different(*resumed[:2]) if of_rank(place)]
    assert [place for place in own if place.startswith("/streams")]  # each has its own generators
    assert "/global" in own
    shared = [p for p in resumed[0] if p.startswith("/streams/shared")]
    assert shared
    assert all(resumed[0][place] == result[place] for place in shared for result in resumed)
    for folder in tmp_path.glob("checkpoint-*"):
        assert inspect(folder, checksums=True).damage is None


@pytest.mark.parametrize(
    ("shape", "path"),
    [
        (PLAIN, [("ddp", 2), ("hsdp", 4), ("offload", 2), ("ddp", 1), ("fsdp2", 4), ("ddp", 4)]),
        (ADAPTERS, [("hsdp", 4), ("fsdp2", 1), ("fsdp2", 2), ("ddp", 1)]),
    ],
    ids=["all weights", "adapters"],
)
def test_other_ranks_and_strategies_read_the_same_tensors(tmp_path, path, shape):
    (strategy, size), *rest = path
    [before, *_] = run_on_ranks(train, tmp_path, 3, strategy, 0, {}, shape, size=size)
    for seed, (strategy, size) in enumerate(rest, start=1):
        [first, *others] = run_on_ranks(train, tmp_path, 3, strategy, seed, {}, shape, size=size)
        assert different(before, first) == [], (strategy, size)
        for result in others:
            # Its own generators start anew where the checkpoint has none of this rank.
            assert all(of_rank(place) for place in different(before, result)), (strategy, size)


@pytest.mark.parametrize(("strategy", "size"), [("ddp", 2), ("fsdp2", 2), ("hsdp", 4)])
def test_each_piece_is_written_once_and_all_ranks_write(tmp_path, strategy, size):
    run_on_ranks(train, tmp_path, 4, strategy, size=size)
    folder = tmp_path / "checkpoint-000004"
    for below, per_weight in (
        ("roles/student/transformer", 1),
        ("optimizers/student.transformer", 2),
    ):
        pieces = [count_values(file) for file in sorted((folder / below).glob("*.safetensors"))]
        assert len(pieces) == size
        full = {name for piece in pieces for name in piece if "weight" in name or "bias" in name}
        assert sum(piece.get(name, 0) for piece in pieces for name in full) == 70 * per_weight
        sizes = [sum(piece.values()) for piece in pieces]
        assert max(sizes) < 0.7 * sum(sizes)
    # And whoever reads it needs to know nothing of ranks.
    weight = StoredCheckpoint.open(folder).weights("student")["transformer"]
    full = weight.read(["0.weight"])["0.weight"]
    assert full.shape == (6, 4)
    for start in range(7):
        for stop in range(start, 7):
            assert torch.equal(weight.read_rows("0.weight", start, stop), full[start:stop])


def count_values(file: Path) -> dict[str, int]:
    """Count the values of a tensor in ``file``."""
    with safe_open(file, framework="pt") as stream:
        names = list(stream.keys())
        return {name: math.prod(stream.get_slice(name).get_shape()) for name in names}


def test_weights_that_a_forward_pass_left_whole_are_saved_in_parts(tmp_path):
    assert run_on_ranks(save_after_a_look, tmp_path, "fsdp2") == [[False, True]] * 2
    files = (tmp_path / "checkpoint-000001" / "roles/student/transformer").glob("*")
    assert [count_values(file)["0.weight"] for file in files] == [12, 12]


def test_ranks_at_different_iterations_save_nothing(tmp_path):
    outcomes = run_on_ranks(save_at, tmp_path, [3, 4])
    assert "rank 0: 3, rank 1: 4" in outcomes[0]
    assert "rank 0: 3, rank 1: 4" in outcomes[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sharded", [False, True])
def test_the_mean_over_ranks_says_which_checkpoints_stay(tmp_path, sharded):
    """Rank 0 alone would keep the first one."""
    scores = [{1: 0.0, 2: 2.0, 3: 3.0, 4: 9.0}, {1: 6.0, 2: 0.0, 3: 1.0, 4: 9.0}]
    assert run_on_ranks(keep, tmp_path, scores, sharded) == [None, None]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-000002",
        "checkpoint-000004",
    ]
    assert inspect(tmp_path / "checkpoint-000002", checksums=True).manifest.metrics == {
        "score": 1.0
    }


def test_a_metric_of_one_rank_alone_is_recorded(tmp_path):
    assert run_on_ranks(keep, tmp_path, [{}, {1: 1.0, 2: 2.0, 3: 3.0}], False) == [None, None]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-000001", "checkpoint-000003"}


@pytest.mark.parametrize(
    ("how", "config", "word"),
    [
        ("full", {}, "No space left on device"),
        ("full", {"async_save": True}, "No space left on device"),
        ("spoilt", {}, "inf in a shard"),
    ],
)
def test_a_save_that_fails_on_one_rank_fails_on_all(tmp_path, how, config, word):
    outcomes = run_on_ranks(train_and_lose_a_rank, tmp_path, "fsdp2", how, config)
    assert outcomes[0] == outcomes[1]
    assert word in outcomes[0]
    assert "rank 1" in outcomes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000002"]
    assert isinstance(run_on_ranks(train, tmp_path, 4, "fsdp2")[0], dict)


@pytest.mark.parametrize(
    ("strategy", "size", "how", "who", "config"),
    [
        pytest.param("fsdp2", 2, "kill", 1, {}, id="save"),
        pytest.param(
            "hsdp", 4, "kill", 3, {"async_save": True}, marks=pytest.mark.slow, id="background"
        ),
        pytest.param("ddp", 2, "kill", 0, {"async_save": True}, id="first rank"),
        pytest.param("fsdp2", 2, "stop", 1, {"timeout_seconds": 5.0}, id="hangs"),
        pytest.param("hsdp", 4, "step", 2, {"async_save": True, "every_steps": 1}, id="step"),
    ],
)
def test_a_rank_that_is_lost_tears_nothing(tmp_path, strategy, size, how, who, config):
    began = time.monotonic()
    outcomes = run_on_ranks(train_and_lose_a_rank, tmp_path, strategy, how, config, who, size=size)
    assert time.monotonic() - began < 100  # far from the half hour of torch's own timeout
    for rank, text in enumerate(outcomes):
        if rank == who:
            assert not text
        elif how == "step":
            assert text.startswith("in a step:")
        else:
            assert f"rank {rank} lost the others" in text
            # One that waits for the first rank hears no more than that it is gone.
            assert f"Ranks {who} failed" in text or rank or who == 0
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert folders
    assert folders[-1].name in ("checkpoint-000002", "checkpoint-000003")
    assert all(inspect(folder, checksums=True).damage is None for folder in folders)
    assert_same_end(run_on_ranks(train, tmp_path, 4, strategy, 1, size=size), strategy)
