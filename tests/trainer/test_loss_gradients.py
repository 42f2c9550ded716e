"""What each loss contributes to the gradients: right, and without a trace in the run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loss_runs import WEIGHTS, Asks, OneLossEach, build, train, train_and_ask
from ranks import run_on_ranks
from torch import Tensor
from toy_trainer import batches


def expected(batch: Tensor) -> dict[str, float]:
    """Differentiate each loss by itself, in a method of its own."""
    norms = {}
    for name, weight in WEIGHTS.items():
        method = build()
        (weight * method.single_train_step(batch, 1).loss_map[name]).backward()
        for key, module in method.model_dict.items():
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            if gradients:
                norms[f"{key}/{name}"] = float(torch.nn.utils.get_total_norm(gradients))
    return norms


def test_each_loss_is_measured_with_its_weight_and_nothing_moves(tmp_path: Path) -> None:
    asked, plain = train(tmp_path / "asked", Asks()), train(tmp_path / "plain")
    for name, value in plain["weights"].items():
        assert np.array_equal(asked["weights"][name], value), name
    assert plain["measured"] == [{}, {}, {}]
    first, second, third = asked["measured"]
    assert (bool(first), second, bool(third)) == (True, {}, True)
    # Of the last micro batch, with the weights of before the first step.
    assert first == pytest.approx(expected(batches()[1]), rel=1e-5)
    assert set(first) == {
        "student.net/fit_loss", "student.net/size_loss", "critic.net/size_loss",
        "critic.net/critic_loss",
    }  # fmt: skip


def test_a_loss_alone_is_the_whole_gradient_and_costs_no_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: passes.append(a) or grad(*a, **k))
    run = train(tmp_path, Asks(), kind=OneLossEach, steps=1)
    assert run["measured"][0] == {
        "student.net/fit_loss": run["norms"][0]["grad_norm/student.net"],
        "critic.net/critic_loss": run["norms"][0]["grad_norm/critic.net"],
    }
    assert len(passes) == 1, "of the total by its terms"


def test_where_torch_cannot_the_run_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("donated buffers")

    plain = train(tmp_path / "plain")
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    caplog.set_level(logging.INFO)
    run = train(tmp_path / "asked", Asks())
    assert run["measured"] == [{}, {}, {}]
    assert [r.getMessage() for r in caplog.records if "loss by loss" in r.getMessage()] == [
        "gradients are not measured loss by loss in this run: donated buffers"
    ]
    assert all(np.array_equal(run["weights"][n], v) for n, v in plain["weights"].items())


def test_each_rank_measures_its_own_batch(tmp_path: Path) -> None:
    # All ranks have the same batches here, so what comes of it is that of one process.
    alone = train(tmp_path / "alone", samples=2)
    for rank in run_on_ranks(train_and_ask, tmp_path / "ranks"):
        assert rank["measured"][0] == pytest.approx(expected(batches()[0]), rel=1e-5)
        assert all(np.array_equal(rank["weights"][n], v) for n, v in alone["weights"].items())
