"""Small methods and watchers for the trainer's tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from distill_protocols import (
    Callback,
    Condition,
    ModelBundle,
    RandomStreams,
    RoleHandle,
    RowGenerators,
    RunState,
    SampleView,
    StepRecord,
    StepResult,
)
from distill_runtime import DistillMethod
from distill_trainer import (
    OptimizerConfig,
    TrainingConfig,
    ValidationConfig,
    ViewConfig,
    build_optimizers,
)
from torch import Tensor, distributed, nn
from torch.optim import Optimizer


def linear_role(
    name: str, *, trainable: bool = True, precision: Any = "fp32", seed: int = 0
) -> RoleHandle:
    """Build a role of one 3 -> 3 linear module, ``net``, with weights by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Linear(3, 3)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return RoleHandle(name=name, modules={"net": net}, trainable=trainable, precision=precision)


def own_streams() -> RandomStreams:
    """Return this rank's random streams."""
    if not distributed.is_initialized():
        return RandomStreams(0)
    return RandomStreams(0, rank=distributed.get_rank(), world_size=distributed.get_world_size())


class Alternating(DistillMethod[None]):
    """The student learns every ``interval``-th iteration, the critic in all others.

    A batch is a tensor [B, 3], or a pair (ids, tensor).
    """

    required_roles = ("student", "critic")

    def __init__(self, bundle: ModelBundle, interval: int) -> None:
        self.interval = interval
        super().__init__(bundle, None, streams=own_streams())

    def turn(self, iteration: int) -> str:
        return "student" if iteration % self.interval == 0 else "critic"

    def single_train_step(self, batch: Any, iteration: int) -> StepResult:
        x = batch[1] if isinstance(batch, tuple) else batch
        name = self.turn(iteration)
        role = self.bundle[name]
        with role.autocast():
            out = role.modules["net"](x)
        loss = (out.float() - x.flip(1)).square().mean()
        return StepResult(
            {"total_loss": loss, f"{name}_loss": loss}, {"out": out.detach(), "size": x.norm()}
        )

    def get_optimizers(self, iteration: int) -> dict[str, Optimizer]:
        return self.optimizers_of(self.turn(iteration))

    def batch_ids(self, batch: Any) -> tuple[str, ...]:
        return batch[0] if isinstance(batch, tuple) else ()


def alternating(
    interval: int = 2,
    *,
    horizon: int = 100,
    precision: Any = "fp32",
    optimizer: OptimizerConfig | None = None,
) -> Alternating:
    """Build the method with fresh roles and optimizers."""
    roles = {
        name: linear_role(name, precision=precision, seed=i)
        for i, name in enumerate(("student", "critic"))
    }
    for role in roles.values():
        build_optimizers(role, optimizer or OptimizerConfig(lr=0.01), horizon=horizon)
    return Alternating(ModelBundle(roles), interval)


def batches(count: int = 7, size: int = 2, seed: int = 0) -> list[Tensor]:
    """Return ``count`` tensors [size, 3]."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, generator=generator) for _ in range(count)]


def training(folder: Path, steps: int, **changes: Any) -> TrainingConfig:
    """Return a configuration without progress lines and trackers."""
    defaults: dict[str, Any] = {"progress": False, "trackers": ()}
    return TrainingConfig(output_dir=str(folder), max_train_steps=steps, **{**defaults, **changes})


class Recorder(Callback):
    """Keeps every record, and the names of the hooks in their order."""

    def __init__(self, name: str = "recorder", log: list[str] | None = None) -> None:
        self.name = name
        self.calls = [] if log is None else log
        self.records: list[StepRecord] = []

    def _note(self, hook: str) -> None:
        self.calls.append(f"{self.name}.{hook}")

    def on_train_start(self, run: RunState) -> None:
        self._note("train_start")

    def on_step_start(self, run: RunState) -> None:
        self._note("step_start")

    def on_before_optimizer_step(self, run: RunState) -> None:
        self._note("before_optimizer_step")

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        self._note("step_end")
        self.records.append(step)

    def on_exception(self, run: RunState, error: BaseException) -> None:
        self._note(f"exception:{type(error).__name__}")

    def on_train_end(self, run: RunState) -> None:
        self._note("train_end")


class MemoryTracker:
    """A tracker that keeps everything."""

    def __init__(self) -> None:
        self.scalars: list[tuple[int, dict[str, float]]] = []
        self.videos: list[tuple[int, str, Tensor]] = []
        self.texts: list[tuple[int, str, str]] = []
        self.closed = False

    def log_scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self.scalars.append((iteration, dict(values)))

    def log_video(self, iteration: int, name: str, clips: Tensor, fps: float) -> None:
        self.videos.append((iteration, name, clips))

    def log_text(self, iteration: int, name: str, text: str) -> None:
        self.texts.append((iteration, name, text))

    def close(self) -> None:
        self.closed = True


class MemoryCheckpointer:
    """Notes what the trainer asks for; checks losses before each save, as a real one must."""

    def __init__(self, resume_at: int = 0, log: list[str] | None = None) -> None:
        self.resume_at = resume_at
        self.calls = [] if log is None else log
        self.saved: list[int] = []

    def resume(self, run: RunState, callbacks: Mapping[str, Callback]) -> int:
        self.calls.append("checkpointer.resume")
        return self.resume_at

    def after_step(self, run: RunState, callbacks: Mapping[str, Callback]) -> None:
        self.calls.append("checkpointer.after_step")
        self._save(run)

    def finish(self, run: RunState, callbacks: Mapping[str, Callback]) -> None:
        self.calls.append("checkpointer.finish")
        if self.saved[-1:] != [run.iteration]:
            self._save(run)

    def on_exception(self, run: RunState, error: BaseException) -> None:
        self.calls.append(f"checkpointer.exception:{type(error).__name__}")

    def _save(self, run: RunState) -> None:
        run.check_finite()
        self.saved.append(run.iteration)


class Sampling(Alternating):
    """Clips of the student's weights and of the seed's noise, as a real method makes them."""

    def sample_for_logging(
        self,
        views: Sequence[SampleView],
        cond: Condition,
        *,
        seed: int,
        rows: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        clips = {}
        for view in views:
            role = self.bundle[view.role]
            assert rows is not None
            assert len(rows) == len(cond)
            noise = RowGenerators.seeded(seed, "look", rows).normal((3, 2, 4, 4))
            with role.averaged(ema=view.ema):
                net = role.modules["net"]
                assert not net.training
                assert not torch.is_grad_enabled()
                clips[view.name] = net(noise.transpose(1, 4)[..., :3]).transpose(1, 4)[
                    :, :3, :, :, :4
                ]
                clips[view.name] = clips[view.name].sigmoid()
        return clips


class Prompts:
    def negative(self) -> Condition:
        raise AssertionError("validation needs no negative condition of its own")

    def encode(self, prompts: Sequence[str], images: object = None) -> Condition:
        return Condition({"text": torch.zeros(len(prompts), 1, 1)})


def validation_config(**changes: object) -> ValidationConfig:
    views = {"live": ViewConfig(role="student"), "ema": ViewConfig(role="student", ema=True)}
    return ValidationConfig(
        **{"prompts": ("a seven", "a three"), "views": views, "every_steps": 2, **changes}  # type: ignore[arg-type]
    )
