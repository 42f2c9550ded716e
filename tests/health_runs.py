"""Small runs that health watches: DMD2 of the toy family. Importable by forked processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_checkpoint import CheckpointConfig, CheckpointManager
from distill_conformance.toy import LATENT_SHAPE, TEXT_DIM, ToyAdapter, ToyConditioning
from distill_evaluation.health.callback import HealthCallback
from distill_evaluation.health.config import HealthConfig
from distill_methods import DMD2Config, DMD2Method
from distill_protocols import (
    Batch,
    Callback,
    Condition,
    RandomStreams,
    RowGenerators,
    RunParts,
    RunState,
    SamplerSpec,
    StepRecord,
    TrainableMethod,
)
from distill_trainer import DistillTrainer
from torch import Tensor, distributed
from toy_roles import toy_bundle
from toy_trainer import MemoryTracker, training

CONFIG = DMD2Config(
    student_sampler=SamplerSpec(steps=2, timesteps=(1000.0, 700.0), stochastic=True),
    generator_update_interval=2,
    real_score_guidance_scale=1.5,
)
PROMPTS = 3


class Data:
    """Batches that are functions of their position; those of each rank are its rows."""

    def __init__(self, rank: int, size: int, samples: int = 4) -> None:
        self.position, self._rank, self._size, self._samples = 0, rank, size, samples

    def __iter__(self) -> Iterator[Batch]:
        while True:
            rows = range(self.position * self._samples, (self.position + 1) * self._samples)
            self.position += 1
            yield batch_of(list(rows)[self._rank :: self._size])

    def state_dict(self) -> dict[str, object]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def batch_of(rows: Sequence[int]) -> Batch:
    return Batch(
        latents=RowGenerators.seeded(0, "data.latents", rows).normal(LATENT_SHAPE),
        cond=Condition({"text": RowGenerators.seeded(0, "data.text", rows).normal((TEXT_DIM,))}),
        ids=tuple(map(str, rows)),
    )


def captions(count: int) -> Batch:
    """Samples without clips."""
    batch = batch_of(range(count))
    return Batch(latents=None, cond=batch.cond, ids=batch.ids, latent_shape=LATENT_SHAPE)


class At(Callback):
    """Does something at the end of one iteration."""

    name = "at"
    only_observes = True

    def __init__(self, iteration: int, action: Callable[[RunState], None]) -> None:
        self._iteration, self._action = iteration, action

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if step.iteration == self._iteration:
            self._action(run)


class ToyRun:
    """A run of DMD2 on toy roles.

    Args:
        lr: of student and critic; the toy networks live on 1e-2.
        health: None: nobody watches.
    """

    def __init__(
        self, folder: Path, *, steps: int = 12, lr: float = 1e-2,
        health: HealthConfig | None = None, checkpoint: CheckpointConfig | None = None,
        examples: Callable[[int], Batch] | None = lambda count: batch_of(range(count)),
        others: Sequence[Callback] = (),
        first: Sequence[Callback] = (),
    ) -> None:  # fmt: skip
        several = distributed.is_initialized()
        rank = distributed.get_rank() if several else 0
        size = distributed.get_world_size() if several else 1
        bundle = toy_bundle(student=1, teacher=1, critic=1, lr=lr)
        adapter = ToyAdapter(bundle)
        streams = RandomStreams(3, rank=rank, world_size=size)
        self.method: TrainableMethod = DMD2Method(
            bundle, adapter, CONFIG, conditioning=ToyConditioning(), streams=streams
        )
        parts: Any = RunParts(
            method=self.method, adapter=adapter, conditioning=ToyConditioning(), exporter=None,
            output_dir=folder, method_config=CONFIG, examples=examples, micro_batch=2,
        )  # fmt: skip
        self.health = None if health is None else HealthCallback(health, parts)
        self.tracker = MemoryTracker()
        self.loader = Data(rank, size)
        manager = None if checkpoint is None else CheckpointManager(checkpoint, folder, {})
        self.trainer = DistillTrainer(
            training(folder, steps, global_batch_size=4, log_every=3),
            callbacks=[*first, *([self.health] if self.health else []), *others],
            trackers=[self.tracker],
            checkpointer=manager,
        )
        self.folder = folder

    def train(self) -> ToyRun:
        self.result = self.trainer.run(self.method, self.loader)
        return self

    @property
    def alarms(self) -> list[dict[str, Any]]:
        file = self.folder / "health.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def weights(self) -> dict[str, Tensor]:
        return {
            f"{key}.{name}": value.clone()
            for key, module in self.method.model_dict.items()
            for name, value in module.state_dict().items()
        }


def watched_numbers(folder: Path, config: HealthConfig) -> dict[str, Any]:
    """Train on this process or on all of them; the history as this rank knows it."""
    run = ToyRun(folder, steps=6, health=config).train()
    assert run.health is not None
    state: Any = run.health.state_dict()
    return {"history": state["history"], "texts": run.tracker.texts, "alarms": state["alarms"]}
