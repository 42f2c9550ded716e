"""Processes over gloo, forked from a server that has imported everything: a second a test."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from distill_checkpoint import CheckpointConfig, CheckpointManager
from distill_checkpoint.snapshot import Snapshot
from distill_checkpoint.tensors import write_tensors
from distill_protocols import Callback, CheckpointError, RankError, RunState, StepRecord
from tiny_run import Run, Shape, new_run
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

CONTEXT = multiprocessing.get_context("forkserver")
# Where forked children find this file: imported once, in the server that they are forked from.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
CONTEXT.set_forkserver_preload(
    [
        "ranks",
        "spread",
        "lockstep_ranks",
        "rank_jobs",
        "wan_ranks",
        "expert_ranks",
        "app_ranks",
        "torch._dynamo",
    ]
)

EMPTY: Mapping[str, Any] = {}
PLAIN = Shape(callbacks=())
ADAPTERS = Shape(callbacks=(), trained=frozenset({"4.weight", "0.bias"}))

PATIENCE = 300
"""Seconds after which a test gives a child up; boxes are shared."""


def together(
    target: Callable[..., Any],
    *args: Any,
    size: int = 2,
    timeout: float = PATIENCE,
    context: Any = CONTEXT,
) -> list[Any]:
    """What ``target(*args)`` returned on each of ``size`` ranks.

    Its traceback, if it raised; nothing of one that was killed, stopped, or does not end.

    Args:
        timeout: seconds after which a collective of theirs gives a rank up.
        context: of multiprocessing; ``fork`` where this process holds what takes long to import.
    """
    with TemporaryDirectory(ignore_cleanup_errors=True) as store:
        pipes, children = [], []
        for rank in range(size):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(
                target=_rank, args=(store, rank, size, timeout, theirs, target, args)
            )
            child.start()
            theirs.close()
            pipes.append(ours)
            children.append(child)
        return _results(children, pipes)


def _rank(
    store: str, rank: int, size: int, timeout: float, pipe: Any, target: Any, args: Any
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{store}/store", rank=rank, world_size=size,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
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
            stopped = child.pid is not None and state(child.pid) == "T"
            found.append(pipe.recv() if not stopped and pipe.poll(PATIENCE) else "")
        except EOFError:
            found.append("")  # killed
        finally:
            child.kill()
            child.join()
    return found


def state(pid: int) -> str:
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


def run_of_rank(*, seed: int, strategy: str, shape: Shape = PLAIN) -> Run:
    """A run whose noise and dropout are this rank's own, with weights that all have alike."""
    run = new_run(shape, seed=seed)
    run.method.streams.rank = distributed.get_rank()
    run.method.streams.world_size = distributed.get_world_size()
    torch.manual_seed(100 * seed + distributed.get_rank())
    ema = run.callbacks.pop("ema")
    run.callbacks.update(sync=Sync(), ema=ema)
    for role in run.method.bundle.roles.values():
        for key, module in role.modules.items():
            shard(module, strategy)
            if role.trainable:
                _renew_optimizer(role, key)
    # After the optimizers were renewed: the counters hang on these.
    run.method.__init__(run.method.bundle, None, streams=run.method.streams)  # type: ignore[misc]
    return run


def shard(module: nn.Module, strategy: str) -> None:
    """Put DTensors in the place of parameters: the last child's by itself, then the rest's.

    Args:
        strategy: ``ddp`` leaves all as it is; ``offload`` is fsdp2 with its parts in host memory.
    """
    size = distributed.get_world_size()
    if strategy == "ddp":
        return
    if strategy == "hsdp":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("copies", "parts"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    offload = CPUOffloadPolicy(pin_memory=False) if strategy == "offload" else OffloadPolicy()
    *_, last = module.children()
    for part in (last, module):
        fully_shard(part, mesh=mesh, offload_policy=offload)


def _renew_optimizer(role: Any, key: str) -> None:
    # fully_shard puts new parameters in the place of those that the optimizer was made for.
    old = role.optimizers[key]
    group = {k: v for k, v in old.param_groups[0].items() if k not in ("params", "initial_lr")}
    new = type(old)(role.trained_parameters(key).values())
    new.param_groups[0].update(group)
    role.optimizers[key] = new
    role.schedulers[key] = torch.optim.lr_scheduler.ConstantLR(new, factor=0.5, total_iters=3)


def train(
    folder: Path,
    steps: int,
    strategy: str,
    seed: int = 0,
    checkpoint: Mapping[str, Any] = EMPTY,
    shape: Shape = PLAIN,
) -> dict[str, str]:
    """Go on to ``steps`` and save; a fingerprint of everything on this rank."""
    run = run_of_rank(seed=seed, strategy=strategy, shape=shape)
    config = CheckpointConfig(**{"resume": "latest", "timeout_seconds": 60.0, **checkpoint})
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
    folder: Path, strategy: str, how: str, checkpoint: Mapping[str, Any], who: int = 1
) -> str:
    """Save iteration 2, then 4, in which rank ``who`` fails ``how``; what this rank says of it."""
    train(folder, 2, strategy, 0, checkpoint)
    if distributed.get_rank() == who:
        if how == "full":
            _no_space_left()
        elif how == "spoilt":
            _spoilt_shard()
        elif how == "step":
            _dies_in_a_step()
        else:
            _dies_in_a_save({"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
    try:
        train(folder, 4, strategy, 0, checkpoint)
    except CheckpointError as error:
        return str(error)
    except RankError as error:
        if how != "step":
            raise
        return f"in a step: {str(error).splitlines()[0]}"
    return "saved"


def _dies_in_a_save(how: signal.Signals) -> None:
    def fail(snapshot: Snapshot, folder: Path, ranks: Any) -> Any:
        path, share = next(iter(snapshot.by_all_ranks.items()))
        write_tensors(folder / path, share, ranks=ranks)  # a part of it is on the disk
        os.kill(os.getpid(), how)
        raise AssertionError("it goes on")

    Snapshot.write = fail  # type: ignore[method-assign]


def _dies_in_a_step() -> None:
    before = Sync.on_before_optimizer_step

    def die(callback: Sync, run: RunState) -> None:
        if run.iteration == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        before(callback, run)

    Sync.on_before_optimizer_step = die  # type: ignore[method-assign]


def _spoilt_shard() -> None:
    from distill_checkpoint import manager

    def refuse(_: Any) -> None:
        raise CheckpointError("inf in a shard")

    manager._refuse_non_finite = refuse  # type: ignore[assignment]


def _no_space_left() -> None:
    from distill_checkpoint import tensors

    def write(path: Path, *_: Any, **__: Any) -> Any:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    tensors.write_safetensors = write  # type: ignore[assignment]
