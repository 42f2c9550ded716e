"""What ranks do in the tests of how they stay together, for ``ranks.together``."""

from __future__ import annotations

import io
import math
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from distill_protocols import Callback, RunState, StepRecord
from distill_runtime import Ranks
from distill_trainer import (
    DebugDumpCallback,
    DebugDumpConfig,
    DistillTrainer,
    ParamCountCallback,
    ProfilerCallback,
    ProfilerConfig,
    TrainingConfig,
    check_same_run,
)
from distill_trainer.callbacks.progress import ProgressCallback
from distill_trainer.config import DistributedConfig
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from toy_trainer import Alternating, MemoryTracker, Recorder, alternating, batches, training

TIMEOUT = 4.0
"""Seconds that a test of a time-out waits."""

PATIENCE = 60.0
"""Seconds for all others, which no busy box shall end."""


def patience(how: str) -> float:
    return TIMEOUT if how in ("stop", "slow") else PATIENCE


def outcome(action: Callable[[], Any]) -> str:
    """What an action came to: its error with its notes, or ``fine``."""
    try:
        action()
    except BaseException as error:
        notes: list[str] = getattr(error, "__notes__", [])
        return "\n".join([f"{type(error).__name__}: {error}", *notes])
    return "fine"


def misfortune(how: str) -> None:
    """To this process, now."""
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "slow":
        time.sleep(2 * TIMEOUT)
    if how == "raise":
        raise ValueError("boom")
    if how == "runtime":
        raise RuntimeError("boom in a kernel")
    if how == "interrupt":
        raise KeyboardInterrupt


class Unlucky(Alternating):
    """Some ranks meet a misfortune in the step of iteration 3."""

    how = "none"
    ranks: tuple[int, ...] = (1,)

    def single_train_step(self, batch: Any, iteration: int) -> Any:
        found = super().single_train_step(batch, iteration)
        if iteration == 3 and distributed.get_rank() in self.ranks:
            misfortune(self.how)
            if self.how == "inf":
                return found._replace(
                    loss_map={name: loss * math.inf for name, loss in found.loss_map.items()}
                )
        return found


def _training(folder: Path, steps: int, **changes: Any) -> TrainingConfig:
    """One micro step an iteration, for any number of ranks."""
    return training(folder, steps, global_batch_size=distributed.get_world_size(), **changes)


def _run(folder: Path, method: Any, how: str = "none", **parts: Any) -> str:
    waits = DistributedConfig(timeout_seconds=patience(how))
    config = _training(folder, 5, distributed=waits, log_every=2)
    return outcome(lambda: DistillTrainer(config, **parts).run(method, batches()))


def fail_in_a_step(folder: Path, how: str, *failing: int) -> str:
    """The ranks ``failing`` fail ``how`` in the step of iteration 3; ranks meet in looks only."""
    method = Unlucky(alternating().bundle, 2)
    method.how, method.ranks = how, failing
    return _run(folder, method, how)


class _Averages(Callback):
    """Gradients over a group of its own, after ``rank`` has met its misfortune."""

    name = "averages"

    def __init__(self, how: str) -> None:
        self.how = how
        self.group = distributed.new_group(timeout=timedelta(seconds=patience(how)))

    def on_before_optimizer_step(self, run: RunState) -> None:
        run.enter("sum over ranks")
        if run.iteration == 2 and distributed.get_rank() == 1:
            misfortune(self.how)
        for module in run.method.model_dict.values():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    distributed.all_reduce(parameter.grad, group=self.group)


def fail_before_a_collective(folder: Path, how: str) -> str:
    """Rank 1 fails ``how`` before a collective of a callback, which rank 0 waits in."""
    return _run(folder, alternating(), how, callbacks=[_Averages(how)])


class _Wrapped(Unlucky):
    """Its step goes through one module, which ``wrap`` has made of another."""

    net: nn.Module

    def single_train_step(self, batch: Any, iteration: int) -> Any:
        if iteration == 3 and distributed.get_rank() in self.ranks:
            misfortune(self.how)
        loss = self.net(batch).square().mean()
        return super().single_train_step(batch, iteration)._replace(loss_map={"total_loss": loss})

    def optimizers_schedulers_step(self, iteration: int) -> tuple[str, ...]:
        return ()


def fail_beside_backward(folder: Path, how: str, sharded: bool) -> str:
    """Rank 1 fails before its forward; rank 0 waits in DDP's backward, or in FSDP's gather."""
    method = _Wrapped(alternating().bundle, 2)
    method.how = how
    # 1 MB and more: what a busy box may buffer is sent without the other's help.
    net = nn.Sequential(nn.Linear(3, 600), nn.Linear(600, 600), nn.Linear(600, 3))
    if sharded:
        fully_shard(net, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
        method.net = net
    else:
        group = distributed.new_group(timeout=timedelta(seconds=patience(how)))
        method.net = DistributedDataParallel(net, process_group=group)
    return _run(folder, method, how)


class _Asks(Callback):
    """Asks for a stop ``times`` in one hook, by rank."""

    name = "asks"

    def __init__(self, *times: int) -> None:
        self.times = times[distributed.get_rank()]

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if step.iteration == 2:
            for _ in range(self.times):
                run.method.stop.poll()


def ask_unequally(folder: Path) -> str:
    """Rank 0 asks once more in a callback than rank 1."""
    return _run(folder, alternating(), callbacks=[_Asks(3, 2)])


def train_unequally(folder: Path) -> str:
    """Rank 0 skips iteration 2, as one that resumed from another checkpoint would."""

    class Skips(Callback):
        name = "skips"

        def on_step_end(self, run: RunState, step: StepRecord) -> None:
            if step.iteration == 1 and run.ranks.is_first:
                run.iteration += 1

    return _run(folder, alternating(), callbacks=[Skips()])


def fail_after_the_end(folder: Path, how: str) -> str:
    """Rank 1 fails in ``on_train_end``, where rank 0 asks for a stop."""

    class Ends(Callback):
        name = "ends"

        def on_train_end(self, run: RunState) -> None:
            if distributed.get_rank() == 1:
                misfortune(how)
            run.method.stop.poll()

    return _run(folder, alternating(), callbacks=[Ends()])


def resolve(runs: list[dict[str, Any]]) -> str:
    """Each rank has a run file of its own."""
    ranks = Ranks.of_this_run(60.0)
    return outcome(lambda: check_same_run(ranks, runs[distributed.get_rank()]))


class _Numbers(Callback):
    """A metric that is the rank's number, and one that rank 1 alone has in some iterations."""

    name = "numbers"

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        rank = distributed.get_rank()
        run.metrics["rank"] = torch.tensor(float(rank))
        if rank == 1 and step.iteration % 2:
            run.metrics["odd"] = 10.0 * step.iteration


class _Sharded(Alternating):
    """Gives out DTensors: a loss that is a sum over ranks, and a clip that is cut over them."""

    def single_train_step(self, batch: Any, iteration: int) -> Any:
        found = super().single_train_step(batch, iteration)
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        mine = torch.tensor(1.0 + distributed.get_rank())
        total = DTensor.from_local(mine, mesh, [Partial()])
        rows = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
        return found._replace(
            loss_map=found.loss_map | {"sum": total}, outputs={"sum_out": total, "rows": rows}
        )


def write(folder: Path) -> Any:
    """Four iterations with everything that writes, into a folder of all ranks; (numbers, texts,
    whether it was closed) of this rank's tracker, what it printed, its own losses."""
    tracker, recorder, stream = MemoryTracker(), Recorder(), io.StringIO()
    callbacks = [
        _Numbers(),
        recorder,
        ParamCountCallback(),
        DebugDumpCallback(DebugDumpConfig(every_steps=3)),
        ProfilerCallback(ProfilerConfig(start=2, steps=1)),
        ProgressCallback(1, stream, seconds_between_lines=0),
    ]
    config = _training(folder, 4, log_every=2)
    method = _Sharded(alternating().bundle, 2)
    rank = distributed.get_rank()
    DistillTrainer(config, callbacks=callbacks, trackers=[tracker]).run(method, batches(seed=rank))
    losses = [record.losses["total_loss"].item() for record in recorder.records]
    return tracker.scalars, len(tracker.texts), tracker.closed, stream.getvalue(), losses


def dump_an_error(folder: Path) -> str:
    """Rank 1 alone fails, and dumps what it has of a step with sharded outputs."""

    class Fails(_Sharded):
        def single_train_step(self, batch: Any, iteration: int) -> Any:
            if iteration == 3 and distributed.get_rank() == 1:
                raise ValueError("boom")
            return super().single_train_step(batch, iteration)

    return _run(
        folder, Fails(alternating().bundle, 2), callbacks=[DebugDumpCallback(DebugDumpConfig())]
    )


def trace_all(folder: Path) -> str:
    """A trace of every rank."""
    config = ProfilerConfig(start=2, steps=1, all_ranks=True)
    return _run(folder, alternating(), callbacks=[ProfilerCallback(config)])


def named_trackers(folder: Path) -> list[str]:
    """Each rank has a folder of its own; what the trackers of the run file put there."""
    own = folder / str(distributed.get_rank())
    config = _training(own, 2, progress=True, log_every=1, trackers=("tensorboard", "jsonl"))
    DistillTrainer(config).run(alternating(), batches())
    return sorted(path.name for path in own.iterdir())
