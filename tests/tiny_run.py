"""A small run with everything that a checkpoint has to hold: two-expert student, critic, frozen
teacher, two kinds of optimizer and schedule, averages, dropout, named generators, a stateful
callback and a loader with a position. Importable by forked processes.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from distill_checkpoint import CheckpointConfig, CheckpointManager
from distill_protocols import (
    EXIT_EMBEDDING,
    Callback,
    ModelBundle,
    RandomStreams,
    RoleHandle,
    RunState,
    SamplerSpec,
    StepRecord,
    StepResult,
    derive_seed,
)
from distill_runtime import ALONE, DistillMethod
from distill_trainer import (
    DistillTrainer,
    DistributedConfig,
    Distribution,
    EmaCallback,
    EmaConfig,
    TrainingConfig,
)
from torch import Tensor, distributed, nn

FEATURES = 4


@frozen(kw_only=True)
class Shape:
    """What may differ between two runs."""

    interval: int = 2
    accumulation: int = 1
    ema_roles: tuple[str, ...] = ("student",)
    precision: str = "fp32"
    width: int = 6
    extra_roles: tuple[str, ...] = ()
    told_exits: bool = False
    """The critic has a second module, which no call of this method reads."""
    callbacks: tuple[str, ...] = ("tally",)
    trained: frozenset[str] | None = None
    """Of the student's modules; the rest is a frozen base (LoRA)."""


def net(seed: int, width: int) -> nn.Module:
    """Build a network with a buffer that moves (batch norm) and one that draws (dropout)."""
    module = nn.Sequential(
        nn.Linear(FEATURES, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.2),
        nn.Linear(width, FEATURES),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return module


class Loader:
    """Batches that are functions of (seed, position)."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            generator = torch.Generator().manual_seed(derive_seed(3, self.position))
            self.position += 1
            yield torch.randn(5, FEATURES, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


class Tally(Callback):
    """State of every kind that a callback may have."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.best = float("inf")
        self.sum = torch.zeros(FEATURES, dtype=torch.float64)
        self.stepped: list[tuple[int, str]] = []

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        self.best = min(self.best, step.losses["total_loss"].item())
        self.sum += step.outputs["mean"].double()
        self.stepped += [(step.iteration, key) for key in step.stepped]

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "sum": self.sum, "stepped": self.stepped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.sum, self.stepped = state["best"], state["sum"], state["stepped"]


class TinyMethod(DistillMethod[None]):
    """The student follows teacher and critic, the critic the student, taking turns."""

    required_roles = ("student", "teacher", "critic")
    frozen_roles = ("teacher",)
    interval = 2

    def get_optimizers(self, iteration: int) -> dict[str, torch.optim.Optimizer]:
        if iteration % self.interval:
            return self.optimizers_of("critic")
        expert = ("transformer", "transformer_2")[(iteration // self.interval) % 2]
        return {f"student.{expert}": self.bundle["student"].optimizers[expert]}

    @property
    def sampler_spec(self) -> SamplerSpec:
        return SamplerSpec(steps=2)

    def single_train_step(self, batch: Tensor, iteration: int) -> StepResult:
        roles = self.bundle.roles
        key = next(iter(self.get_optimizers(iteration)))
        name, module = key.split(".")
        noise = torch.randn(batch.shape, generator=self.streams.get(f"tiny.{name}"))
        with roles[name].autocast():
            out = roles[name].modules[module](batch + noise)
        with torch.no_grad():
            other = roles["critic" if name == "student" else "student"]
            target = roles["teacher"].modules["transformer"](batch)
            target = target + other.modules["transformer"](batch) / 2
        loss = (out.float() - target).square().mean()
        return StepResult({"total_loss": loss}, {"mean": out.detach().float().mean(0)})


def bundle(shape: Shape, seed: int) -> ModelBundle:
    """Trainable roles with weights of ``seed``; the teacher is always the same."""
    experts = ("transformer", "transformer_2")
    student = RoleHandle(
        name="student", trainable=True, precision=shape.precision,  # type: ignore[arg-type]
        modules={key: net(seed + i, shape.width) for i, key in enumerate(experts)},
        trained=None if shape.trained is None else dict.fromkeys(experts, shape.trained),
    )  # fmt: skip
    for i, (key, module) in enumerate(student.modules.items()):
        if shape.trained is not None:
            base = dict(net(77 + i, shape.width).named_parameters())
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if name not in shape.trained:
                        parameter.copy_(base[name])
        parameters = student.trained_parameters(key).values()
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.0, 0.99))
        student.optimizers[key] = optimizer
        student.schedulers[key] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    roles = {
        "student": student,
        "teacher": RoleHandle(name="teacher", modules={"transformer": net(99, shape.width)}),
    }
    for name in ("critic", *shape.extra_roles):
        modules = {"transformer": net(seed + 5, shape.width)}
        if shape.told_exits and name == "critic":
            modules[EXIT_EMBEDDING] = net(seed + 6, shape.width)
        role = RoleHandle(name=name, modules=modules, trainable=True)
        for key, module in modules.items():
            optimizer = torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9)
            role.optimizers[key] = optimizer
            role.schedulers[key] = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5])
        roles[name] = role
    return ModelBundle(roles)


@frozen(kw_only=True)
class Run:
    """The parts of one run, and how to go on with it."""

    shape: Shape
    method: TinyMethod
    loader: Loader = field(factory=Loader)
    callbacks: dict[str, Callback] = field(factory=dict)

    def train(self, output_dir: Path, steps: int, manager: CheckpointManager | None = None) -> None:
        """Train until iteration ``steps``."""
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        training = TrainingConfig(
            output_dir=str(output_dir), max_train_steps=steps, progress=False, trackers=(),
            global_batch_size=self.shape.accumulation * ranks, batch_size_per_device=1,
        )  # fmt: skip
        trainer = DistillTrainer(
            training, callbacks=list(self.callbacks.values()), trackers=(), checkpointer=manager
        )
        trainer.run(self.method, self.loader)

    def state(self, output_dir: Path, iteration: int) -> RunState:
        """Return the state as the trainer hands it to a checkpointer."""
        return RunState(
            method=self.method, loader=self.loader, streams=self.method.streams,
            output_dir=output_dir, max_train_steps=100, ranks=ALONE, iteration=iteration,
        )  # fmt: skip

    def everything(self) -> dict[str, Any]:
        """Return all state that moves, as values to compare."""
        by_module = self.method.bundle.by_module
        return {
            "weights": {key: m.state_dict() for key, m in by_module("modules").items()},
            "optimizers": {key: o.state_dict() for key, o in by_module("optimizers").items()},
            "schedulers": {key: s.state_dict() for key, s in by_module("schedulers").items()},
            "ema": {key: e.state_dict() for key, e in by_module("ema").items()},
            "method": self.method.state_dict(),
            "loader": self.loader.state_dict(),
            "streams": self.method.streams.state_dict(),
            "global": torch.get_rng_state(),
            "callbacks": {name: c.state_dict() for name, c in self.callbacks.items()},
        }


def new_run(shape: Shape, *, seed: int = 0) -> Run:
    """Build a run at its start; ``seed`` is of everything that a resume has to overwrite."""
    torch.manual_seed(seed)
    method = TinyMethod(bundle(shape, seed), None, streams=RandomStreams(seed=7))
    method.interval = shape.interval
    callbacks: dict[str, Callback] = {name: Tally(name) for name in shape.callbacks}
    if shape.ema_roles:
        callbacks["ema"] = EmaCallback(EmaConfig(roles=shape.ema_roles, decay=0.9))
    return Run(shape=shape, method=method, callbacks=callbacks)


def train_to_the_end(
    output_dir: str, steps: int, width: int, in_background: bool = False, last_sync: int = 0
) -> None:
    """Resume, and train until ``steps`` with a save after each, in a process of its own.

    Or until the ``last_sync``-th time that it waits for the disk: SIGKILL, in the middle of a save.
    """
    calls, sync = itertools.count(1), os.fsync

    def fsync(descriptor: int) -> None:
        if next(calls) == last_sync:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(descriptor)

    os.fsync = fsync
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    config = CheckpointConfig(every_steps=1, resume="latest", async_save=in_background)
    manager = CheckpointManager(config, output_dir, {"width": width})
    new_run(Shape(width=width)).train(Path(output_dir), steps, manager)


def save_and_leave(output_dir: str, width: int) -> None:
    """Save in the background and end without waiting, in a process of its own."""
    torch.set_num_threads(1)
    run = new_run(Shape(width=width))
    manager = CheckpointManager(CheckpointConfig(async_save=True), output_dir, {})
    manager.save(run.state(Path(output_dir), 1), run.callbacks)
    raise SystemExit(3)


def one_process() -> Distribution:
    """Return a distribution of one process on the CPU."""
    return Distribution(config=DistributedConfig(), device=torch.device("cpu"))
