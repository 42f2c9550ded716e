"""Buckets and mixtures over processes: the samples of one process, step by step, also after a
resume on another number of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from app_ranks import (
    assert_weights_alike,
    read_losses,
    read_weights,
    run_file,
    train_and_list_samples,
)
from distill_conditioning import ShardWriter
from distill_protocols import Condition
from ranks import run_on_ranks

SQUARE, WIDE, PICTURE = (8, 3, 4, 4), (8, 2, 4, 6), (8, 1, 6, 4)
BUCKETS = [
    {"num_frames": 9, "height": 32, "width": 32},
    {"num_frames": 5, "height": 32, "width": 48},
    {"height": 48, "width": 32},
]
COUNTS = {"clips": {SQUARE: 5, WIDE: 6}, "pictures": {PICTURE: 3}}


@pytest.fixture
def sets(tmp_path) -> list[dict[str, Any]]:
    """Two data sets of three shapes, none of which divides by a group."""
    generator = torch.Generator().manual_seed(0)
    written = []
    for name, counts in COUNTS.items():
        with ShardWriter(tmp_path / name) as writer:
            writer.set_negative("", Condition({"text": torch.zeros(1, 8, 64)}))
            for shape, count in counts.items():
                ids = [f"{'x'.join(map(str, shape))}-{n}" for n in range(count)]
                latents = torch.randn(count, *shape, generator=generator)
                text = torch.randn(count, 8, 64, generator=generator)
                writer.add(ids, ids, latents, Condition({"text": text}))
        weight = 0.7 if name == "clips" else 0.3
        written.append({"path": str(tmp_path / name), "weight": weight})
    return written


STEPS = 8


def file_of(
    folder: Path, name: str, sets: list[dict[str, Any]], *, steps: int = STEPS, **data: Any
) -> Path:
    return run_file(
        folder / f"{name}.yaml",
        "finetune",
        pipeline_config={
            "num_frames": None, "height": None, "width": None, "buckets": BUCKETS,
        },
        data={"path": None, "sets": sets, **data},
        training={
            "max_train_steps": steps, "global_batch_size": 4, "max_micro_batch_size": None,
            "optimizer": {"schedule": None, "lr": 1e-3},
        },
        checkpoint={"export": None},
    )  # fmt: skip


def samples_by_iteration(file: Path, size: int) -> dict[int, tuple[tuple[int, ...], Counter[str]]]:
    """Train on ``size`` processes; return shape and ids of each iteration, of all together."""
    outcomes = run_on_ranks(train_and_list_samples, file, size=size)
    assert all(isinstance(own, list) for own in outcomes), outcomes
    found: dict[int, list[tuple[tuple[int, ...], tuple[str, ...]]]] = defaultdict(list)
    for own in outcomes:
        for iteration, shape, ids in own:
            found[iteration].append((shape, ids))
    result = {}
    for iteration, batches in found.items():
        [shape] = {shape for shape, _ in batches}  # one on all ranks
        result[iteration] = (shape, Counter(name for _, ids in batches for name in ids))
    return result


@pytest.mark.slow  # four processes that build a run; orders alone are tested in test_buckets.py
def test_two_processes_read_what_one_reads_and_go_on_exactly(tmp_path, sets):
    whole = samples_by_iteration(file_of(tmp_path, "whole", sets), 1)
    assert len({shape for shape, _ in whole.values()}) == 3
    assert all(sum(ids.values()) == 4 for _, ids in whole.values())
    parts = samples_by_iteration(file_of(tmp_path, "parts", sets, steps=3), 2)
    parts |= samples_by_iteration(file_of(tmp_path, "parts", sets, workers=2), 2)
    assert parts == whole
    assert_weights_alike(*(read_weights(tmp_path / name) for name in ("whole", "parts")))
    full, resumed = (read_losses(tmp_path / name) for name in ("whole", "parts"))
    assert full.keys() == resumed.keys()
    for iteration, values in full.items():
        assert resumed[iteration]["loss/total_loss"] == pytest.approx(
            values["loss/total_loss"], rel=2e-4
        )
