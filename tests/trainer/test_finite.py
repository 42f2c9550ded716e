"""A loss that is not finite stops the run before anything is saved of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from distill_protocols import NonFiniteLossError
from distill_trainer import (
    DistillTrainer,
    FiniteGuard,
    GradClipCallback,
    GradClipConfig,
    NonFiniteGradientError,
)
from toy_trainer import Alternating, MemoryCheckpointer, Recorder, alternating, batches, training


def _poisoned(at: int) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    data = [((f"clip-{i}",), x) for i, x in enumerate(batches(6), start=1)]
    data[at - 1][1][0, 0] = math.nan
    return data


def test_it_stops_with_iteration_terms_and_ids_and_before_the_weights_move(tmp_path: Path) -> None:
    method, checkpointer = alternating(2), MemoryCheckpointer()
    with pytest.raises(NonFiniteLossError) as excinfo:
        DistillTrainer(training(tmp_path, 6), checkpointer=checkpointer).run(method, _poisoned(4))
    error = excinfo.value
    assert (error.iteration, error.batch_ids) == (4, ("clip-4",))
    assert set(error.losses) == {"total_loss", "student_loss"}
    assert math.isnan(error.losses["total_loss"])
    assert checkpointer.saved == [1, 2, 3]
    assert method.update_counts == {"student.net": 1, "critic.net": 2}
    assert all(p.isfinite().all() for m in method.model_dict.values() for p in m.parameters())


@pytest.mark.parametrize(("log_every", "saves"), [(1, False), (100, True), (100, False)])
def test_deferred_losses_are_checked_before_a_save_at_log_points_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int, saves: bool
) -> None:
    # What happens on an accelerator, where looking at once would make the host wait.
    monkeypatch.setattr(
        "distill_trainer.loop.trainer.FiniteGuard", lambda **ranks: FiniteGuard(True, **ranks)
    )
    checkpointer, recorder = MemoryCheckpointer() if saves else None, Recorder()
    with pytest.raises(NonFiniteLossError) as excinfo:
        DistillTrainer(
            training(tmp_path, 6, log_every=log_every),
            callbacks=[recorder],
            checkpointer=checkpointer,
        ).run(alternating(2), _poisoned(4))
    assert (excinfo.value.iteration, excinfo.value.batch_ids) == (4, ("clip-4",))
    if checkpointer:
        assert checkpointer.saved == [1, 2, 3]
    if log_every == 1:
        assert len(recorder.records) == 3, "seen before callbacks make anything of iteration 4"


class _RootAtZero(Alternating):
    """Its loss is finite where its gradient is not: sqrt has an infinite slope at 0."""

    def single_train_step(self, batch, iteration):  # type: ignore[no-untyped-def]
        result = super().single_train_step(batch, iteration)
        loss = result.loss_map["total_loss"]
        if "clip-4" in batch[0]:
            loss = loss + (loss - loss.detach()).sqrt()
        return result._replace(loss_map={"total_loss": loss})


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("clips", [False, True])
def test_a_gradient_that_is_not_finite_stops_the_run_unsaved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defer: bool, clips: bool
) -> None:
    monkeypatch.setattr(
        "distill_trainer.loop.trainer.FiniteGuard", lambda **ranks: FiniteGuard(defer, **ranks)
    )
    method, checkpointer = _RootAtZero(alternating(2).bundle, 2), MemoryCheckpointer()
    trainer = DistillTrainer(
        training(tmp_path, 6, log_every=100, global_batch_size=4, batch_size_per_device=2),
        callbacks=[GradClipCallback(GradClipConfig())] if clips else [],
        checkpointer=checkpointer,
    )
    data = [((f"clip-{i}",), x) for i, x in enumerate(batches(6), start=1)]
    with pytest.raises(
        NonFiniteGradientError, match=r"grad_norm/student\.net=(nan|inf)"
    ) as excinfo:
        trainer.run(method, data)
    # Two micro steps an iteration: the student's turn, the second, has clips 3 and 4.
    assert (excinfo.value.iteration, excinfo.value.batch_ids) == (2, ("clip-3", "clip-4"))
    assert "batch: clip-3, clip-4" in str(excinfo.value)
    assert set(excinfo.value.losses) == {"grad_norm/student.net"}
    assert checkpointer.saved == [1]
    full = all(p.isfinite().all() for m in method.model_dict.values() for p in m.parameters())
    assert full is not defer, "at once before the step; deferred before the save"


def test_every_term_counts_not_only_the_total() -> None:
    losses = {"total_loss": torch.tensor(1.0), "gan": torch.tensor(math.inf)}
    with pytest.raises(NonFiniteLossError, match="gan=inf"):
        FiniteGuard().watch(3, losses, ())
    deferred = FiniteGuard(defer=True)
    deferred.watch(3, losses, ())
    with pytest.raises(NonFiniteLossError, match="gan=inf"):
        deferred.check()
    deferred.check()  # what was looked at is let go
