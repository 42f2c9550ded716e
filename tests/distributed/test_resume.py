"""Runs of several processes that stop, go on with as many or with others, or lose one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from app_ranks import (
    assert_weights_alike,
    read_losses,
    read_weights,
    run_file,
    train,
    train_and_lose_rank,
)
from distill_checkpoint.manifest import inspect
from ranks import run_on_ranks
from slow_cases import slow_but

DDP, FSDP2 = {"strategy": "ddp"}, {"strategy": "fsdp2"}
HSDP = {"strategy": "hsdp", "shard_size": 2}


def file_of(folder: Path, name: str, steps: int, distributed: dict[str, Any], **more: Any) -> Path:
    return run_file(
        folder / f"{name}.yaml",
        "dmd2",
        training={
            "max_train_steps": steps,
            "global_batch_size": 4,
            "distributed": distributed,
            "optimizer": {"schedule": None},  # a longer run has another cosine
        },
        method_config={"generator_update_interval": 2},
        callbacks={"ema": {"roles": ["student"], "decay": 0.5, "start_update": 0}},
        **more,
    )


def go(file: Path, size: int) -> None:
    assert run_on_ranks(train, file, size=size) == [""] * size


def test_a_run_on_two_one_and_two_processes_equals_one_on_two(tmp_path):
    go(file_of(tmp_path, "whole", 6, {}), 1)
    go(file_of(tmp_path, "parts", 2, FSDP2), 2)
    go(file_of(tmp_path, "parts", 4, {}), 1)
    go(file_of(tmp_path, "parts", 6, DDP), 2)
    for ema in (False, True):
        full, parts = (read_weights(tmp_path / name, ema=ema) for name in ("whole", "parts"))
        assert_weights_alike(full, parts)
    full, parts = read_losses(tmp_path / "whole"), read_losses(tmp_path / "parts")
    assert full.keys() == parts.keys()
    for iteration, values in full.items():
        for name in ("loss/total_loss", "loss/critic_loss"):
            assert parts[iteration][name] == pytest.approx(values[name], rel=2e-4)


@pytest.mark.parametrize(
    ("how", "distributed"),
    slow_but(("kill",), [("kill", FSDP2), ("stop", DDP)], lambda case: case[0]),
)
def test_a_rank_lost_in_a_step_ends_all_and_latest_resumes(tmp_path, how, distributed):
    """What goes on is, bit for bit, the run that lost nobody."""
    settings = {**distributed, "timeout_seconds": 15.0}
    file = file_of(tmp_path, "run", 4, settings, checkpoint={"every_steps": 2})
    began = time.monotonic()
    lost, survivor = 1, 0
    outcomes = run_on_ranks(train_and_lose_rank, file, lost, 3, how)
    assert time.monotonic() - began < 100  # bounded: torch's own patience is half an hour
    assert outcomes[survivor].startswith("RankError: "), outcomes
    assert "rank 1" in outcomes[survivor]
    assert "iteration 3" in outcomes[survivor]
    folders = sorted(path.name for path in (tmp_path / "run").glob("*checkpoint-*"))
    assert folders == ["checkpoint-000002"]
    assert inspect(tmp_path / "run" / folders[0], checksums=True).damage is None
    go(file, 2)
    go(file_of(tmp_path, "whole", 4, settings), 2)
    for ema in (False, True):
        full, parts = (read_weights(tmp_path / name, ema=ema) for name in ("whole", "run"))
        assert all(torch.equal(full[name], parts[name]) for name in full)
    assert read_losses(tmp_path / "whole") == read_losses(tmp_path / "run")
