"""A run that logs every third iteration and saves every second. Importable by forked processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill_checkpoint import CheckpointConfig, CheckpointManager
from distill_protocols import Callback, RunState, StepRecord
from distill_trainer import DistillTrainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed
from toy_trainer import alternating, batches, training

STEPS = 8


class At(Callback):
    """Does something at the end of one iteration."""

    name = "at"

    def __init__(self, iteration: int, action: Callable[[RunState], None]) -> None:
        self._iteration = iteration
        self._action = action

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if step.iteration == self._iteration:
            self._action(run)


class KilledError(Exception):
    """Stands for a process that is killed."""


def kill(run: RunState) -> None:
    raise KilledError


def stop(run: RunState) -> None:
    run.request_stop("asked")


def train_logged(folder: Path, *events: tuple[int, Callable[[RunState], None]]) -> None:
    """Train to the end, a process after each event."""
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    for event in (*events, None):
        callbacks = [] if event is None else [At(*event)]
        config = CheckpointConfig(every_steps=2, resume="latest")
        trainer = DistillTrainer(
            training(
                folder, STEPS, log_every=3, trackers=("tensorboard", "jsonl"),
                global_batch_size=ranks,
            ),
            callbacks=callbacks,
            checkpointer=CheckpointManager(config, folder, {}),
        )  # fmt: skip
        try:
            trainer.run(alternating(2), batches(seed=rank))
        except KilledError:
            continue


def read_logs(folder: Path) -> tuple[list[Any], dict[str, Any]]:
    """Read metrics.jsonl and TensorBoard's events without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scalars = {
        name: [(scalar.step, scalar.value) for scalar in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if not name.startswith("time")
    }
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines], scalars
