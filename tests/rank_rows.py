"""A run whose data, noise and choices are of the whole run, whatever the number of its ranks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from distill_checkpoint import CheckpointConfig, CheckpointManager
from distill_conditioning import DataConfig, LatentDataset, LatentLoader
from distill_protocols import (
    Batch,
    Callback,
    ModelBundle,
    RandomStreams,
    RoleHandle,
    RunState,
    StepResult,
)
from distill_runtime import DistillMethod
from distill_trainer import EmaCallback, EmaConfig
from ranks import Sync, fingerprint, shard
from tiny_run import Run, Shape
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

FEATURES = 8
"""Of a sample of ``toy_data``: 2 x 1 x 2 x 2."""
GLOBAL_BATCH = 4
PER_LINK = 2
"""Iterations from one start to the next."""

Seen = tuple[int, str, str, float]
"""(iteration, sample, hash of its noise, what all ranks drew alike)."""


class Rows(DistillMethod[None]):
    """Two roles learn by turns to take the noise away."""

    required_roles = ("student", "critic")

    def __init__(self, bundle: ModelBundle, streams: RandomStreams) -> None:
        super().__init__(bundle, None, streams=streams)
        self.seen: list[Seen] = []

    def get_optimizers(self, iteration: int) -> dict[str, torch.optim.Optimizer]:
        return self.optimizers_of("critic" if iteration % 3 else "student")

    def single_train_step(self, batch: Batch, iteration: int) -> StepResult:
        x = batch.latents.flatten(1) / 8
        text = batch.cond.tensors["text"].mean((1, 2))[:, None]
        noise = self.streams.rows("rows.noise", len(x)).normal((FEATURES,))
        t = self.streams.rows("rows.t", len(x)).uniform()[:, None]
        alike = torch.rand((), generator=self.streams.get("rows.alike", shared=True)).item()
        torch.rand((), generator=self.streams.get("rows.own"))
        for name, row in zip(batch.ids, noise, strict=True):
            digest = hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16]
            self.seen.append((iteration, name, digest, alike))
        [key] = self.get_optimizers(iteration)
        net = self.bundle[key.split(".")[0]].modules["net"]
        out = net((1 - t) * x + t * noise + text)
        return StepResult({"total_loss": (out - x).square().mean()}, {})


class Beginning(Callback):
    """A fingerprint of the run when its first iteration begins, so after the resume."""

    name = "beginning"

    def __init__(self, run: Run) -> None:
        self._run = run
        self.found: dict[str, str] = {}

    def on_step_start(self, run: RunState) -> None:
        self.found = self.found or fingerprint(self._run)


@frozen(kw_only=True)
class Link:
    """The numbers of one rank in one part of a run.

    Attributes:
        weights: live and averaged, whole, at the end.
    """

    seen: list[Seen]
    began: dict[str, str]
    ended: dict[str, str]
    weights: dict[str, list[Any]]


def go_on(folder: Path, data: Path, strategy: str) -> Link:
    """Train ``PER_LINK`` more iterations from the newest checkpoint in ``folder``, and save."""
    done = [int(path.name[-6:]) for path in folder.glob("checkpoint-*")]
    steps = max(done, default=0) + PER_LINK
    run = rows_run(data, strategy)
    beginning = Beginning(run)
    run.callbacks["beginning"] = beginning
    config = CheckpointConfig(timeout_seconds=60.0, async_save=True)
    run.train(folder, steps, CheckpointManager(config, folder, {}))
    return Link(
        seen=run.method.seen,  # type: ignore[attr-defined]
        began=beginning.found,
        ended=fingerprint(run),
        weights=_whole(run),
    )


def rows_run(data: Path, strategy: str, kind: type[Rows] = Rows) -> Run:
    """Make this rank's part of a run."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    roles = {}
    for number, name in enumerate(("student", "critic")):
        net = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, FEATURES))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
        shard(net, strategy)
        role = RoleHandle(name=name, modules={"net": net}, trainable=True)
        optimizer = torch.optim.AdamW(role.trained_parameters("net").values(), lr=1e-3)
        role.optimizers["net"] = optimizer
        role.schedulers["net"] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        roles[name] = role
    dataset = LatentDataset(DataConfig(path=str(data), workers=1))
    stored = dataset.negative()
    assert stored is not None
    loader = LatentLoader(
        dataset,
        batch_size=GLOBAL_BATCH // size,
        seed=3,
        dropout=0.3,
        negative=stored.condition,
        rank=rank,
        world_size=size,
    )
    streams = RandomStreams(7, rank=rank, world_size=size)
    ema = EmaCallback(EmaConfig(roles=("student",), decay=0.9))
    return Run(
        shape=Shape(),
        method=kind(ModelBundle(roles), streams),  # type: ignore[arg-type]
        loader=loader,  # type: ignore[arg-type]
        callbacks={"sync": Sync(), "ema": ema},
    )


def _whole(run: Run) -> dict[str, list[Any]]:
    def listed(value: Tensor) -> list[Any]:
        full = value.full_tensor() if isinstance(value, DTensor) else value
        return full.detach().flatten().tolist()

    bundle = run.method.bundle
    live = {
        f"{role}/{name}": listed(value)
        for role, handle in bundle.roles.items()
        for name, value in handle.moving_state("net").items()
    }
    average = bundle["student"].ema["net"].weights()
    return live | {f"ema/{name}": listed(value) for name, value in average.items()}
