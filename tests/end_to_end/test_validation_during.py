"""Validation during a run on the shipped tiny Wan: clips, losses, x0, and that it only looks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distill_runfile.read import read_config
from distill_train.build import Run, build
from tiny_file import TINY
from tiny_run import one_process


def trained(path: Path) -> Run:
    torch.manual_seed(0)
    run = build(read_config(path), distribution=one_process())
    run.trainer.checkpointer = None
    run.trainer.run(run.method, run.loader)
    return run


def everything(run: Run) -> list[torch.Tensor]:
    by_module = run.bundle.by_module
    states = [m.state_dict() for kind in ("modules", "ema") for m in by_module(kind).values()]  # type: ignore[call-overload]
    states.append(run.method.streams.state_dict())
    return [*(value for state in states for value in state.values()), torch.get_rng_state()]


def test_a_run_does_not_notice_its_validation(tiny: Callable[..., Path], tmp_path: Path) -> None:
    held_out = tmp_path / "held_out"
    shutil.copytree(TINY / "data", held_out)
    options: dict[str, Any] = {
        "training": {"max_train_steps": 4, "log_every": 1, "trackers": ["jsonl"]},
        "method_config": {"generator_update_interval": 2},
        "callbacks": {"report": None, "ema": {"start_update": 0}},
        "checkpoint": {"export": []},
    }
    plain = trained(tiny("dmd2", **options, validation=None))
    before, position = everything(plain), plain.loader.state_dict()
    validation = {
        "every_steps": 2,
        "at_start": True,
        "data": {"path": str(held_out)},
        "batches": 2,
        "prompts": ["the digit three moving up", "the digit seven moving left"],
        "x0": {"roles": ["student", "critic"], "t": [500]},
        "views": {"ema": {"role": "student", "ema": True}},
    }
    looked_at = trained(tiny("dmd2", **options, validation=validation))
    after = everything(looked_at)
    assert len(before) == len(after)
    assert all(map(torch.equal, before, after))
    assert looked_at.loader.state_dict() == position

    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    losses = {line["iteration"]: line for line in lines if "validation/loss/dmd_loss" in line}
    assert list(losses) == [0, 2, 4]
    for line in losses.values():
        # The copy is the training data themselves, in the same order.
        assert line["validation/drift/dmd_loss"] == line["validation/drift/critic_loss"] == 0
    assert losses[0]["validation/loss/dmd_loss"] != losses[4]["validation/loss/dmd_loss"]
    record = json.loads((tmp_path / "out/validation/iteration-000004/validation.json").read_text())
    assert [
        (tmp_path / "out/validation/iteration-000004/x0" / f).is_file()
        for f in (record["x0"]["files"])
    ] == [True, True]
    assert record["x0"]["view"] == "teacher_32", "which does not change"
    held_out_losses = record["losses"]["held_out"]
    assert held_out_losses["dmd_loss"] == losses[4]["validation/loss/dmd_loss"]
    assert {view["folder"].split("/")[0] for view in record["views"].values()} == {
        "kept", "iteration-000004",
    }  # fmt: skip
