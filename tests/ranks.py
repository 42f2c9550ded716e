"""Run functions on several processes over gloo, forked from a server that has imported all."""

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
        "distribution_ranks",
        "monitor_ranks",
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

TIMEOUT = 300
"""Seconds after which a test gives up waiting for a child; machines are shared."""


def run_on_ranks(
    target: Callable[..., Any],
    *args: Any,
    size: int = 2,
    timeout: float = TIMEOUT,
    context: Any = CONTEXT,
) -> list[Any]:
    """Run ``target(*args)`` on ``size`` ranks and return the results in the order of ranks.

    In place of a result: the traceback of a rank that raised, "" of one that was killed, was
    stopped or did not end.

    Args:
        timeout: seconds after which a collective gives up waiting for a rank.
        context: of multiprocessing; ``fork`` if imports of this process take long.
    """
    with TemporaryDirectory(ignore_cleanup_errors=True) as store:
        pipes, children = [], []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(
                target=run_rank, args=(store, rank, size, timeout, sender, target, args)
            )
            child.start()
            sender.close()
            pipes.append(receiver)
            children.append(child)
        return collect_results(children, pipes)


def run_rank(
    store: str, rank: int, size: int, timeout: float, pipe: Any, target: Any, args: Any
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{store}/store", rank=rank, world_size=size,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    # Or a rank that ends at once closes connections that another is still making.
    distributed.barrier()
    try:
        pipe.send(target(*args))
    except BaseException:
        pipe.send(traceback.format_exc())
    # Not destroy_process_group: it may wait for a rank that a test has killed.
    os._exit(0)


def collect_results(children: list[BaseProcess], pipes: list[Any]) -> list[Any]:
    results = []
    for child, pipe in zip(children, pipes, strict=True):
        try:
            stopped = child.pid is not None and state(child.pid) == "T"
            results.append(pipe.recv() if not stopped and pipe.poll(TIMEOUT) else "")
        except EOFError:
            results.append("")  # killed
        finally:
            child.kill()
            child.join()
    return results


def state(pid: int) -> str:
    """Return the kernel's letter for the state of a process: T for stopped, X for ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


class Sync(Callback):
    """Do what data parallelism does: average gradients, broadcast rank 0's buffers."""

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
    """Build a run with this rank's own noise and dropout, and with equal weights on all ranks."""
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
                renew_optimizer(role, key)
    # After the optimizers were renewed: the counters hang on these.
    run.method.__init__(run.method.bundle, None, streams=run.method.streams)  # type: ignore[misc]
    return run


def shard(module: nn.Module, strategy: str) -> None:
    """Put DTensors in the place of parameters: the last child's by itself, then the rest's.

    Args:
        strategy: ``ddp`` shards nothing; ``offload`` is fsdp2 with its shards in host memory.
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


def renew_optimizer(role: Any, key: str) -> None:
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
    """Resume, train to ``steps`` and save; return a fingerprint of everything on this rank."""
    run = run_of_rank(seed=seed, strategy=strategy, shape=shape)
    config = CheckpointConfig(**{"resume": "latest", "timeout_seconds": 60.0, **checkpoint})
    run.train(folder, steps, CheckpointManager(config, folder, {"a": 1}))
    return fingerprint(run)


def fingerprint(run: Run) -> dict[str, str]:
    """Hash each tensor and number, by its path; a sharded tensor is gathered first."""
    hashes: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}/{key}")
        elif isinstance(value, list | tuple):
            for i, item in enumerate(value):
                walk(item, f"{path}/{i}")
        else:
            hashes[path] = hashlib.sha256(_bytes(value)).hexdigest()[:16]

    walk(run.everything(), "")
    return hashes


def _bytes(value: Any) -> bytes:
    if not isinstance(value, Tensor):
        return repr(value).encode()
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return str(full.dtype).encode() + full.detach().contiguous().numpy().tobytes()


def train_and_lose_a_rank(
    folder: Path, strategy: str, failure: str, checkpoint: Mapping[str, Any], victim: int = 1
) -> str:
    """Save iteration 2, then 4, in which rank ``victim`` fails; return this rank's error.

    Args:
        failure: a ``full`` disk, a ``spoilt`` shard, killed in a ``step``, or in the save a
            ``kill`` or ``stop``.
    """
    train(folder, 2, strategy, 0, checkpoint)
    if distributed.get_rank() == victim:
        if failure == "full":
            fill_disk()
        elif failure == "spoilt":
            refuse_shard()
        elif failure == "step":
            die_in_step()
        else:
            die_in_save({"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[failure])
    try:
        train(folder, 4, strategy, 0, checkpoint)
    except CheckpointError as error:
        return str(error)
    except RankError as error:
        if failure != "step":
            raise
        return f"in a step: {str(error).splitlines()[0]}"
    return "saved"


def die_in_save(how: signal.Signals) -> None:
    def fail(snapshot: Snapshot, folder: Path, ranks: Any) -> Any:
        path, share = next(iter(snapshot.by_all_ranks.items()))
        write_tensors(folder / path, share, ranks=ranks)  # part of the checkpoint is on the disk
        os.kill(os.getpid(), how)
        raise AssertionError("the process survived its signal")

    Snapshot.write = fail  # type: ignore[method-assign]


def die_in_step() -> None:
    before = Sync.on_before_optimizer_step

    def die(callback: Sync, run: RunState) -> None:
        if run.iteration == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        before(callback, run)

    Sync.on_before_optimizer_step = die  # type: ignore[method-assign]


def refuse_shard() -> None:
    from distill_checkpoint import manager

    def refuse(_: Any) -> None:
        raise CheckpointError("inf in a shard")

    manager._refuse_non_finite = refuse  # type: ignore[assignment]


def fill_disk() -> None:
    from distill_checkpoint import tensors

    def write(path: Path, *_: Any, **__: Any) -> Any:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    tensors.write_safetensors = write  # type: ignore[assignment]
