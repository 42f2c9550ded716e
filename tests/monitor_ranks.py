"""What ranks run in the tests of ``RankMonitor``, for ``ranks.run_on_ranks``."""

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

LONG_TIMEOUT = 60.0
"""Seconds for all other tests, long enough for a busy machine."""


def timeout_for(failure: str) -> float:
    return TIMEOUT if failure in ("stop", "slow") else LONG_TIMEOUT


def describe_error(action: Callable[[], Any]) -> str:
    """Run ``action`` and return its error with its notes, or ``no error``."""
    try:
        action()
    except BaseException as error:
        notes: list[str] = getattr(error, "__notes__", [])
        return "\n".join([f"{type(error).__name__}: {error}", *notes])
    return "no error"


def fail(failure: str) -> None:
    """Let this process fail, now."""
    if failure == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if failure == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if failure == "slow":
        time.sleep(2 * TIMEOUT)
    if failure == "raise":
        raise ValueError("boom")
    if failure == "runtime":
        raise RuntimeError("boom in a kernel")
    if failure == "interrupt":
        raise KeyboardInterrupt


class FailingMethod(Alternating):
    """A method that fails on some ranks in the step of iteration 3."""

    failure = "none"
    ranks: tuple[int, ...] = (1,)

    def single_train_step(self, batch: Any, iteration: int) -> Any:
        result = super().single_train_step(batch, iteration)
        if iteration == 3 and distributed.get_rank() in self.ranks:
            fail(self.failure)
            if self.failure == "inf":
                return result._replace(
                    loss_map={name: loss * math.inf for name, loss in result.loss_map.items()}
                )
        return result


def _training(folder: Path, steps: int, **changes: Any) -> TrainingConfig:
    """Return a config of one micro step per iteration for any number of ranks."""
    return training(folder, steps, global_batch_size=distributed.get_world_size(), **changes)


def _run(folder: Path, method: Any, failure: str = "none", **parts: Any) -> str:
    waits = DistributedConfig(timeout_seconds=timeout_for(failure))
    config = _training(folder, 5, distributed=waits, log_every=2)
    return describe_error(lambda: DistillTrainer(config, **parts).run(method, batches()))


def fail_in_a_step(folder: Path, failure: str, *failing: int) -> str:
    """Let the ranks ``failing`` fail in the step of iteration 3, outside of any collective."""
    method = FailingMethod(alternating().bundle, 2)
    method.failure, method.ranks = failure, failing
    return _run(folder, method, failure)


class _SumGradients(Callback):
    """Sum gradients over a group of its own, after rank 1 has failed."""

    name = "averages"

    def __init__(self, failure: str) -> None:
        self.failure = failure
        self.group = distributed.new_group(timeout=timedelta(seconds=timeout_for(failure)))

    def on_before_optimizer_step(self, run: RunState) -> None:
        run.enter("sum over ranks")
        if run.iteration == 2 and distributed.get_rank() == 1:
            fail(self.failure)
        for module in run.method.model_dict.values():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    distributed.all_reduce(parameter.grad, group=self.group)


def fail_before_a_collective(folder: Path, failure: str) -> str:
    """Let rank 1 fail before a collective of a callback in which rank 0 waits."""
    return _run(folder, alternating(), failure, callbacks=[_SumGradients(failure)])


class _MethodOfOneModule(FailingMethod):
    """A method whose step calls one wrapped module."""

    net: nn.Module

    def single_train_step(self, batch: Any, iteration: int) -> Any:
        if iteration == 3 and distributed.get_rank() in self.ranks:
            fail(self.failure)
        loss = self.net(batch).square().mean()
        return super().single_train_step(batch, iteration)._replace(loss_map={"total_loss": loss})

    def optimizers_schedulers_step(self, iteration: int) -> tuple[str, ...]:
        return ()


def fail_beside_backward(folder: Path, failure: str, sharded: bool) -> str:
    """Let rank 1 fail before its forward while rank 0 waits in DDP's backward or FSDP's gather."""
    method = _MethodOfOneModule(alternating().bundle, 2)
    method.failure = failure
    # More than 1 MB: smaller messages may be buffered and sent although the other rank is gone.
    net = nn.Sequential(nn.Linear(3, 600), nn.Linear(600, 600), nn.Linear(600, 3))
    if sharded:
        fully_shard(net, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
        method.net = net
    else:
        group = distributed.new_group(timeout=timedelta(seconds=timeout_for(failure)))
        method.net = DistributedDataParallel(net, process_group=group)
    return _run(folder, method, failure)


class _PollStop(Callback):
    """Poll for a stop in one hook, this rank's number of ``times``."""

    name = "asks"

    def __init__(self, *times: int) -> None:
        self.times = times[distributed.get_rank()]

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if step.iteration == 2:
            for _ in range(self.times):
                run.method.stop.poll()


def poll_unequally(folder: Path) -> str:
    """Let rank 0 poll once more in a callback than rank 1."""
    return _run(folder, alternating(), callbacks=[_PollStop(3, 2)])


def train_unequally(folder: Path) -> str:
    """Let rank 0 skip iteration 2, as if it had resumed from another checkpoint."""

    class Skips(Callback):
        name = "skips"

        def on_step_end(self, run: RunState, step: StepRecord) -> None:
            if step.iteration == 1 and run.ranks.is_first:
                run.iteration += 1

    return _run(folder, alternating(), callbacks=[Skips()])


def fail_after_the_end(folder: Path, failure: str) -> str:
    """Let rank 1 fail in ``on_train_end``, where rank 0 polls for a stop."""

    class Ends(Callback):
        name = "ends"

        def on_train_end(self, run: RunState) -> None:
            if distributed.get_rank() == 1:
                fail(failure)
            run.method.stop.poll()

    return _run(folder, alternating(), callbacks=[Ends()])


def check_run_files(runs: list[dict[str, Any]]) -> str:
    """Check that all ranks have the same run file; each has its own of ``runs``."""
    ranks = Ranks.of_this_run(60.0)
    return describe_error(lambda: check_same_run(ranks, runs[distributed.get_rank()]))


class _RankMetrics(Callback):
    """Log the rank as a metric, and a metric that rank 1 alone has in some iterations."""

    name = "numbers"

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        rank = distributed.get_rank()
        run.metrics["rank"] = torch.tensor(float(rank))
        if rank == 1 and step.iteration % 2:
            run.metrics["odd"] = 10.0 * step.iteration


class _ShardedOutputs(Alternating):
    """A method that returns DTensors: a partial sum as a loss, and rows sharded over ranks."""

    def single_train_step(self, batch: Any, iteration: int) -> Any:
        result = super().single_train_step(batch, iteration)
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        own = torch.tensor(1.0 + distributed.get_rank())
        total = DTensor.from_local(own, mesh, [Partial()])
        rows = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
        return result._replace(
            loss_map=result.loss_map | {"sum": total}, outputs={"sum_out": total, "rows": rows}
        )


def train_with_outputs(folder: Path) -> Any:
    """Train four iterations with every callback that writes into a folder.

    Returns of this rank: scalars and number of texts of its tracker, whether that was closed, the
    printed text, and the losses.
    """
    tracker, recorder, stream = MemoryTracker(), Recorder(), io.StringIO()
    callbacks = [
        _RankMetrics(),
        recorder,
        ParamCountCallback(),
        DebugDumpCallback(DebugDumpConfig(every_steps=3)),
        ProfilerCallback(ProfilerConfig(start=2, steps=1)),
        ProgressCallback(1, stream, seconds_between_lines=0),
    ]
    config = _training(folder, 4, log_every=2)
    method = _ShardedOutputs(alternating().bundle, 2)
    rank = distributed.get_rank()
    DistillTrainer(config, callbacks=callbacks, trackers=[tracker]).run(method, batches(seed=rank))
    losses = [record.losses["total_loss"].item() for record in recorder.records]
    return tracker.scalars, len(tracker.texts), tracker.closed, stream.getvalue(), losses


def dump_an_error(folder: Path) -> str:
    """Let rank 1 fail in a step with sharded outputs and write a debug dump."""

    class Fails(_ShardedOutputs):
        def single_train_step(self, batch: Any, iteration: int) -> Any:
            if iteration == 3 and distributed.get_rank() == 1:
                raise ValueError("boom")
            return super().single_train_step(batch, iteration)

    return _run(
        folder, Fails(alternating().bundle, 2), callbacks=[DebugDumpCallback(DebugDumpConfig())]
    )


def trace_all(folder: Path) -> str:
    """Write a trace on every rank."""
    config = ProfilerConfig(start=2, steps=1, all_ranks=True)
    return _run(folder, alternating(), callbacks=[ProfilerCallback(config)])


def named_trackers(folder: Path) -> list[str]:
    """List the files that the trackers of a run file write, each rank to a folder of its own."""
    own = folder / str(distributed.get_rank())
    config = _training(own, 2, progress=True, log_every=1, trackers=("tensorboard", "jsonl"))
    DistillTrainer(config).run(alternating(), batches())
    return sorted(path.name for path in own.iterdir())
