"""Two processes over gloo, forked from a server that has imported everything: a second a test."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from distill_checkpoint import CheckpointConfig, CheckpointManager
from distill_checkpoint.capture import Snapshot
from distill_checkpoint.tensors import write_tensors
from distill_protocols import Callback, CheckpointError, RunState, StepRecord
from tiny_run import Run, Shape, new_run
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

CONTEXT = multiprocessing.get_context("forkserver")
# Where forked children find this file: imported once, in the server that they are forked from.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
CONTEXT.set_forkserver_preload(["ranks", "torch._dynamo"])

EMPTY: Mapping[str, Any] = {}

PATIENCE = 120
"""Seconds after which a test gives a child up; boxes are shared."""


def together(target: Callable[..., Any], *args: Any, size: int = 2) -> list[Any]:
    """What ``target(*args)`` returned on each of ``size`` ranks.

    Its traceback, if it raised; nothing of one that was killed, stopped, or does not end.
    """
    with TemporaryDirectory(ignore_cleanup_errors=True) as store:
        pipes, children = [], []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            child = CONTEXT.Process(target=_rank, args=(store, rank, size, theirs, target, args))
            child.start()
            theirs.close()
            pipes.append(ours)
            children.append(child)
        return _results(children, pipes)


def _rank(store: str, rank: int, size: int, pipe: Any, target: Any, args: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{store}/store", rank=rank, world_size=size)
    try:
        pipe.send(target(*args))
    except BaseException:
        pipe.send(traceback.format_exc())
    # Not destroy_process_group: it may wait for a rank that a test has killed.
    os._exit(0)


def _results(children: list[BaseProcess], pipes: list[Any]) -> list[Any]:
    found = []
    for child, pipe in zip(children, pipes, strict=True):
        try:
            stopped = child.pid is not None and _state(child.pid) == "T"
            found.append(pipe.recv() if not stopped and pipe.poll(PATIENCE) else "")
        except EOFError:
            found.append("")  # killed
        finally:
            child.kill()
            child.join()
    return found


def _state(pid: int) -> str:
    """Of a process, as the kernel abbreviates it; T: stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"  # it is over


class Sync(Callback):
    """What data parallelism does: gradients are averaged, buffers are rank 0's."""

    name = "sync"

    def __init__(self) -> None:
        self.drawn = 0.0

    def on_before_optimizer_step(self, run: RunState) -> None:
        self.drawn = torch.rand((), generator=run.streams.get("sync", shared=True)).item()
        for name, value in run.metrics.items():
            if isinstance(value, DTensor):
                run.metrics[name] = value.full_tensor()
        for module in run.method.model_dict.values():
            for parameter in module.parameters():
                if parameter.grad is not None and not isinstance(parameter, DTensor):
                    distributed.all_reduce(parameter.grad)
                    parameter.grad /= distributed.get_world_size()

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        for module in run.method.model_dict.values():
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: Any) -> None:
        self.drawn = state["drawn"]


def run_of_rank(*, seed: int, sharded: bool) -> Run:
    """A run whose noise and dropout are this rank's own, with weights that all have alike."""
    run = new_run(Shape(callbacks=()), seed=seed)
    run.method.streams.rank = distributed.get_rank()
    torch.manual_seed(100 * seed + distributed.get_rank())
    ema = run.callbacks.pop("ema")
    run.callbacks.update(sync=Sync(), ema=ema)
    if sharded:
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        for role in run.method.bundle.roles.values():
            for key, module in role.modules.items():
                fully_shard(module, mesh=mesh)
                if role.trainable:
                    _renew_optimizer(role, key)
    return run


def _renew_optimizer(role: Any, key: str) -> None:
    # fully_shard puts new parameters in the place of those that the optimizer was made for.
    old = role.optimizers[key]
    group = {k: v for k, v in old.param_groups[0].items() if k not in ("params", "initial_lr")}
    new = type(old)(role.trained_parameters(key).values())
    new.param_groups[0].update(group)
    role.optimizers[key] = new
    role.schedulers[key] = torch.optim.lr_scheduler.ConstantLR(new, factor=0.5, total_iters=3)


def train(
    folder: Path, steps: int, sharded: bool, seed: int = 0, checkpoint: Mapping[str, Any] = EMPTY
) -> dict[str, str]:
    """Go on to ``steps`` and save; a fingerprint of everything on this rank."""
    run = run_of_rank(seed=seed, sharded=sharded)
    config = CheckpointConfig(**{"resume": "latest", "timeout_seconds": 60.0, **checkpoint})
    # After the optimizers were renewed: the counters hang on these.
    run.method.__init__(run.method.bundle, None, streams=run.method.streams)  # type: ignore[misc]
    run.train(folder, steps, CheckpointManager(config, folder, {"a": 1}))
    return fingerprint(run)


def fingerprint(run: Run) -> dict[str, str]:
    """Hash of each tensor and number, by its place; of a sharded tensor as a whole."""
    found: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}/{key}")
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                walk(item, f"{path}/{i}")
        else:
            found[path] = hashlib.sha256(_bytes(value)).hexdigest()[:16]

    walk(run.everything(), "")
    return found


def _bytes(value: Any) -> bytes:
    if not isinstance(value, Tensor):
        return repr(value).encode()
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return str(whole.dtype).encode() + whole.detach().contiguous().numpy().tobytes()


def train_and_lose_a_rank(
    folder: Path, sharded: bool, how: str, checkpoint: Mapping[str, Any]
) -> str:
    """Save iteration 2, then 4, in which rank 1 fails ``how``; what this rank says of it."""
    train(folder, 2, sharded, 0, checkpoint)
    if distributed.get_rank() == 1:

        def fail(snapshot: Snapshot, folder: Path, ranks: Any) -> Any:
            path, share = next(iter(snapshot.shared.items()))
            write_tensors(folder / path, share, ranks=ranks)  # a part of it is on the disk
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
            raise AssertionError("it goes on")

        if how == "full":
            _no_space_left()
        elif how == "spoilt":
            _spoilt_shard()
        else:
            Snapshot.write = fail  # type: ignore[method-assign]
    try:
        train(folder, 4, sharded, 0, checkpoint)
    except CheckpointError as error:
        return str(error)
    return "saved"


def _spoilt_shard() -> None:
    from distill_checkpoint import manager

    def refuse(_: Any) -> None:
        raise CheckpointError("inf in a shard")

    manager._refuse_spoilt = refuse  # type: ignore[assignment]


def _no_space_left() -> None:
    from distill_checkpoint import tensors

    def write(path: Path, *_: Any, **__: Any) -> Any:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    tensors.write_safetensors = write  # type: ignore[assignment]
