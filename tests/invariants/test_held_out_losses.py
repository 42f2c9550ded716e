"""Losses on held-out data, of every method: all terms, the same ones each time, and the run does
not notice. Spread over ranks they are those of one process.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import wan_variants
from distill_protocols import Batch, HeldOutEvaluating, RunState, StopRequested
from distill_runtime import ALONE, DistillMethod
from distill_trainer import HeldOutLosses, LossEvaluator
from distill_trainer.validation.losses import FIRST_ITERATION
from method_cases import CASES, Setups
from ranks import run_on_ranks
from torch import Tensor
from toy_data import write_dataset
from validation_ranks import measure_losses


class Endless:
    """The same batches over and over, from where its state says."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches, self._at = batches, 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self._batches[self._at % len(self._batches)]
            self._at += 1
            yield batch

    def state_dict(self) -> dict[str, object]:
        return {"at": self._at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._at = state["at"]


@pytest.fixture(scope="module")
def setups(tmp_path_factory: pytest.TempPathFactory) -> Setups:
    base, folders = tmp_path_factory.mktemp("variants"), {}
    template = wan_variants.template(base / "template")

    def folder(name: str) -> str:
        if name not in folders:
            folders[name] = str(wan_variants.build(name, template, base / name))
        return folders[name]

    return Setups(folder)


def variant_of(case: str) -> str:
    return "t2v-experts" if CASES[case].experts else "t2v"


def as_run(method: DistillMethod[Any]) -> RunState:
    return RunState(
        method=method, loader=Endless([]), streams=method.streams, output_dir=Path(),
        max_train_steps=9, ranks=ALONE, iteration=3,
    )  # fmt: skip


def everything(method: DistillMethod[Any]) -> dict[str, Any]:
    """All that a run could notice."""
    modules = method.model_dict
    return copy.deepcopy({
        "weights": {k: dict(m.state_dict()) for k, m in modules.items()},
        "gradients": {k: [p.grad for p in m.parameters()] for k, m in modules.items()},
        "needs": {k: [p.requires_grad for p in m.parameters()] for k, m in modules.items()},
        "modes": {k: [part.training for part in m.modules()] for k, m in modules.items()},
        "streams": method.streams.state_dict(),
        "seed": method.streams.seed,
        "torch": torch.get_rng_state(),
        "method": method.state_dict(),
    })  # fmt: skip


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return a == b


@pytest.mark.parametrize("case", CASES)
def test_every_method_is_measured_and_does_not_notice(setups: Setups, case: str) -> None:
    variant = variant_of(case)
    method = setups.build(case, variant, CASES[case].students[0], seed=4)
    data, other = ([setups.batch(variant, 2, seed=s + n) for n in range(3)] for s in (10, 20))
    method.single_train_step(data[0], 1)  # so that streams have moved
    method.optimizers_zero_grad(1)
    before = everything(method)
    evaluator = LossEvaluator(Endless(data), Endless(other), batches=2, seed=3)
    first = evaluator.evaluate(as_run(method))
    assert same(everything(method), before)
    assert evaluator.evaluate(as_run(method)) == first

    config = CASES[case].config
    schedule = range(1, 20)
    terms = {name for n in schedule for name in config.metrics(n) if name.startswith("loss/")}
    if len({config.turns(n) for n in schedule}) > 1:
        terms -= {"loss/total_loss"}
    assert {f"loss/{name}" for name in first.held_out} == terms
    assert first.metrics().keys() == {
        f"validation/{kind}{name.removeprefix('loss')}"
        for name in terms for kind in ("loss", "drift")
    }  # fmt: skip
    # Equal data have equal losses: times, noises and exit steps are shared by both kinds.
    alike = LossEvaluator(Endless(data), Endless(data), batches=2, seed=3).evaluate(as_run(method))
    assert alike.training == alike.held_out == first.held_out
    assert first.training != first.held_out


def test_losses_are_those_of_the_steps_with_streams_of_their_own(setups: Setups) -> None:
    """And a stop in the middle leaves everything as it was."""
    method = setups.build("dmd2 every_step simulate", "t2v-experts", "bidirectional", seed=4)
    data = [setups.batch("t2v-experts", 2, seed=n) for n in range(2)]
    loader = Endless(data)
    evaluator = LossEvaluator(loader, loader, batches=2, seed=3)
    losses = evaluator.evaluate(as_run(method))

    own = setups.build("dmd2 every_step simulate", "t2v-experts", "bidirectional", seed=3)
    # Both step in every second iteration, and these have all losses.
    turns = CASES["dmd2 every_step simulate"].config.turns
    both = [n for n in range(FIRST_ITERATION, FIRST_ITERATION + 9) if len(turns(n)) > 1]
    steps = [own.single_train_step(b, n)[0] for b, n in zip(data, both, strict=False)]
    for name in ("dmd_loss", "critic_loss"):
        mean = sum(step[name].item() for step in steps) / len(steps)
        assert losses.held_out[name] == pytest.approx(mean, rel=1e-5)
    method.optimizers_zero_grad(1)

    before, polls = everything(method), itertools.count()

    def poll() -> None:
        if next(polls) == 2:
            raise StopRequested("preempted")

    method.stop.poll = poll  # type: ignore[method-assign]
    with pytest.raises(StopRequested):
        evaluator.evaluate(as_run(method))
    assert same(everything(method), before)


def test_a_method_may_measure_more(setups: Setups, monkeypatch: pytest.MonkeyPatch) -> None:
    method = setups.build("finetune", "t2v", "bidirectional")
    kind = type(method)

    class More(kind):  # type: ignore[misc, valid-type]
        calls = 0

        def state_dict(self) -> dict[str, object]:
            return {**super().state_dict(), "calls": self.calls}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            super().load_state_dict(state)
            self.calls = state["calls"]

        def evaluate_held_out(self, batch: Batch, iteration: int) -> dict[str, Tensor]:
            self.calls += 1  # of a state that a step moves, as a run of its own would
            assert not torch.is_grad_enabled()
            assert not self.bundle["student"].modules["transformer"].training
            return {"latent_mean": batch.clean_latents.mean()}

    assert not isinstance(method, HeldOutEvaluating)
    method.__class__ = More
    data = [setups.batch("t2v", 2, seed=n) for n in range(2)]
    losses = LossEvaluator(Endless(data), Endless(data), batches=2, seed=3).evaluate(as_run(method))
    expected = sum(float(batch.clean_latents.mean()) for batch in data) / 2
    assert losses.held_out["latent_mean"] == pytest.approx(expected)
    assert losses.metrics()["validation/drift/latent_mean"] == 0
    assert method.calls == 0, "it is as it was"


@pytest.mark.parametrize("strategy", ["none", "fsdp"])
def test_on_several_ranks_they_are_those_of_one(tmp_path: Path, strategy: str) -> None:
    data = str(write_dataset(tmp_path / "data", 20))
    [alone] = run_on_ranks(measure_losses, data, "none", size=1)
    results = run_on_ranks(measure_losses, data, strategy, size=2)
    assert alone["held_out"].keys() == {"student_loss", "critic_loss"}
    assert alone["alike"]
    samples = sorted(alone["ids"])
    assert sorted(name for rank in results for name in rank["ids"]) == samples
    for rank in results:
        assert rank["alike"]
        for kind in ("held_out", "training"):
            assert rank[kind] == results[0][kind], "all have the mean over all"
            assert rank[kind] == pytest.approx(alone[kind], rel=1e-5)


def test_drift_is_the_difference_at_equal_weights() -> None:
    losses = HeldOutLosses(held_out={"a": 3.0, "b": 1.0}, training={"a": 2.0})
    assert losses.metrics() == {
        "validation/loss/a": 3.0, "validation/loss/b": 1.0, "validation/drift/a": 1.0,
    }  # fmt: skip
