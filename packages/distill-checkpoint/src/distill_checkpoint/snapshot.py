"""What of a run is in a checkpoint, and how it is written, now or beside the training.

Only trainable roles' weights are saved, and of those only what training changes: the rest is what
its source states, and stays there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import define, evolve, field, frozen
from distill_protocols import (
    Callback,
    CheckpointError,
    ModelBundle,
    RoleHandle,
    RunState,
    WeightAverage,
)
from distill_runtime import FileInfo, Ranks
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distill_checkpoint.config import ChangesConfig
from distill_checkpoint.manifest import (
    LOOP,
    Contents,
    ModuleKey,
    json_of,
    method_path,
    rank_key,
    role_folder,
    state_path,
    write_json,
)
from distill_checkpoint.state_dicts import optimizer_state, pack
from distill_checkpoint.tensors import LocalShard, to_full, to_local, write_tensors

# -- what there is in a run -----------------------------------------------------------------------


def trained_modules(bundle: ModelBundle) -> dict[ModuleKey, RoleHandle]:
    """Return every module that is trained, with its role."""
    return {
        (name, key): role
        for name, role in bundle.roles.items()
        if role.trainable
        for key in role.modules
    }


def optimizers(bundle: ModelBundle) -> dict[ModuleKey, Optimizer]:
    """Return every optimizer, by the module that it updates."""
    return {(n, k): item for n, role in bundle.roles.items() for k, item in role.optimizers.items()}


def schedulers(bundle: ModelBundle) -> dict[ModuleKey, LRScheduler]:
    """Return every learning-rate schedule, by the module whose optimizer it drives."""
    return {(n, k): item for n, role in bundle.roles.items() for k, item in role.schedulers.items()}


def averages(bundle: ModelBundle) -> dict[ModuleKey, WeightAverage]:
    """Return every average of weights, by the module that it is of."""
    return {(n, k): item for n, role in bundle.roles.items() for k, item in role.ema.items()}


def modules_by_kind(bundle: ModelBundle) -> dict[str, tuple[ModuleKey, ...]]:
    """Return all of the above, by the names that they have in a checkpoint (``manifest.KINDS``)."""
    return {
        "roles": tuple(trained_modules(bundle)),
        "optimizers": tuple(optimizers(bundle)),
        "schedulers": tuple(schedulers(bundle)),
        "ema": tuple(averages(bundle)),
    }


def module_tensors(role: RoleHandle, key: str) -> dict[str, Tensor]:
    """What training changes in a module; the tensors themselves, no copies.

    Of an FSDP module these are its shards (DTensor), also where a forward pass without gradients
    has left the root's weights gathered: its ``state_dict`` frees the gathered ones first, and with
    them what ``trained_parameters`` finds.

    Raises:
        CheckpointError: the module's state holds something else than tensors.
    """
    state = role.moving_state(key)
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise CheckpointError(
            f"{role.name}.{key}: {', '.join(other)} in its state_dict is no tensor, and only "
            "tensors go into a weight file. Move it into a buffer or out of get_extra_state."
        )
    return state


def non_finite_weights(bundle: ModelBundle) -> list[str]:
    """``role.module: parameter`` of every trained parameter that holds inf or nan on this rank."""
    parameters = {
        f"{name}.{key}: {parameter_name}": to_local(parameter.detach())
        for (name, key), role in trained_modules(bundle).items()
        for parameter_name, parameter in role.trained_parameters(key).items()
    }
    by_device: dict[torch.device, list[str]] = {}
    for name, value in parameters.items():
        by_device.setdefault(value.device, []).append(name)
    non_finite = []
    for names in by_device.values():
        # One wait for each device, not one for each tensor.
        finite = torch.stack([torch.isfinite(parameters[name]).all() for name in names]).tolist()
        non_finite += [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    return non_finite


# -- the snapshot ---------------------------------------------------------------------------------


@frozen(eq=False)
class Snapshot:
    """Everything that changes in a run, after one iteration; paths are relative to the checkpoint.

    Attributes:
        iteration: the last finished one.
        documents: JSON, written by rank 0.
        by_rank0: tensors that rank 0 writes, in full.
        by_all_ranks: tensors that all ranks write together, each its shard.
        by_this_rank: tensors of this rank alone, and the JSON that belongs to them.
    """

    iteration: int
    documents: dict[Path, Any] = field(factory=dict)
    by_rank0: dict[Path, LocalShard] = field(factory=dict)
    by_all_ranks: dict[Path, LocalShard] = field(factory=dict)
    by_this_rank: dict[Path, tuple[Any, LocalShard]] = field(factory=dict)

    def write(self, folder: Path, ranks: Ranks) -> dict[str, FileInfo]:
        """Write it into ``folder``, all ranks together.

        Returns:
            Every file that was written, by its name relative to ``folder``; the same on all ranks.

        Raises:
            CheckpointError: it could not be written on some rank.
        """
        written: dict[Path, FileInfo] = {}
        for path, shard in self.by_all_ranks.items():
            written |= write_tensors(folder / path, shard, ranks=ranks)

        def write_own_and_list_all() -> dict[str, FileInfo]:
            for path, (value, shard) in self.by_this_rank.items():
                written.update(write_tensors(folder / path, shard))
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                written[folder / json_of(path)] = write_json(folder / json_of(path), value)
            if ranks.is_first:
                for path, shard in self.by_rank0.items():
                    written.update(write_tensors(folder / path, shard))
                for path, value in self.documents.items():
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    written[folder / path] = write_json(folder / path, value)
            return {path.relative_to(folder).as_posix(): info for path, info in written.items()}

        # Rank 0 writes the manifest, so it has to hear of the files of every rank.
        by_rank = ranks.gather_results(write_own_and_list_all)
        return {name: info for files in by_rank for name, info in files.items()}

    def add(self, path: Path, state: object, *, by_all_ranks: bool = False) -> None:
        """Add one state: its tensors under ``path``, the rest in ``path.json``.

        Args:
            by_all_ranks: all ranks write its tensors; else rank 0 does, which gathers sharded ones.
        """
        packed, tensors = pack(state, path.as_posix())
        if tensors and by_all_ranks:
            self.by_all_ranks[path] = LocalShard.of(tensors)
        elif tensors:
            full = {name: to_full(value) for name, value in tensors.items()}
            self.by_rank0[path] = LocalShard.of(full)
        self.documents[json_of(path)] = packed


def capture(
    run: RunState, callbacks: Mapping[str, Callback], ranks: Ranks, changes: ChangesConfig
) -> Snapshot:
    """Collect everything that changes in ``run``. Tensors are the run's own, not copies.

    All ranks call it together.

    Args:
        changes: the rules under which the run was resumed, for ``loop.json``.

    Raises:
        CheckpointError: something on some rank is not what a checkpoint can hold, or they are at
            different iterations.
    """
    snapshot = Snapshot(run.iteration)

    def collect() -> dict[str, object]:
        _add_run_state(snapshot, run, callbacks, changes, ranks.size)
        if own := run.method.rank_state():
            path = method_path(Path(), ranks.rank)
            packed, tensors = pack(own, path.as_posix())
            snapshot.by_this_rank[path] = packed, LocalShard.of(tensors)
        return {
            "iteration": run.iteration,
            "loader": run.loader.state_dict(),
            "rng": _random_state(run),
        }

    by_rank = ranks.gather_results(collect)
    iterations = [state["iteration"] for state in by_rank]
    # Ranks save when they come by: one that skipped an iteration would give its shards of another.
    if len(set(iterations)) > 1:
        listed = ", ".join(f"rank {rank}: {number}" for rank, number in enumerate(iterations))
        raise CheckpointError(
            f"ranks save different iterations ({listed}); a checkpoint is of one, and this would "
            "be put together of several. Whatever ends an iteration early must do so on all ranks: "
            "that is a problem of the method or of a callback"
        )

    def add_state_of_ranks() -> None:
        for name in ("loader", "rng"):
            states = {rank_key(rank): state[name] for rank, state in enumerate(by_rank)}
            snapshot.add(Path(name), states)

    # A loader's state that cannot be packed is an error on all ranks, and not on rank 0 alone.
    ranks.gather_results(add_state_of_ranks)
    return snapshot


def _add_run_state(
    snapshot: Snapshot,
    run: RunState,
    callbacks: Mapping[str, Callback],
    changes: ChangesConfig,
    ranks: int,
) -> None:
    """Add what is of the run as a whole, and not of one rank."""
    root = Path()
    bundle = run.method.bundle
    for (role, key), handle in trained_modules(bundle).items():
        tensors = module_tensors(handle, key)
        if tensors:
            snapshot.by_all_ranks[role_folder(root, role, key)] = LocalShard.of(tensors)
    for (role, key), optimizer in optimizers(bundle).items():
        parameters = bundle.roles[role].trained_parameters(key)
        state = optimizer_state(optimizer, parameters, f"{role}.{key}")
        snapshot.add(state_path(root, "optimizers", role, key), state, by_all_ranks=True)
    for (role, key), scheduler in schedulers(bundle).items():
        snapshot.add(state_path(root, "schedulers", role, key), scheduler.state_dict())
    for (role, key), average in averages(bundle).items():
        snapshot.add(state_path(root, "ema", role, key), average.state_dict(), by_all_ranks=True)
    states = {name: callback.state_dict() for name, callback in callbacks.items()}
    for name, state in states.items():
        if state:
            snapshot.add(state_path(root, "callbacks", name), state)
    snapshot.add(Path("method"), run.method.state_dict())
    contents = Contents(
        iteration=run.iteration,
        micro_steps=run.micro_steps,
        origin=None,
        added=changes.added,
        dropped=changes.dropped,
        ranks=ranks,
        modules=modules_by_kind(bundle),
        callbacks={name: bool(state) for name, state in states.items()},
        observers=tuple(name for name, callback in callbacks.items() if callback.only_observes),
    )
    snapshot.documents[Path(LOOP)] = contents.as_json()


def _random_state(run: RunState) -> dict[str, object]:
    """Return the state of this rank's generators: the run's named ones, and torch's own."""
    # Nothing here draws from torch's own generators; a user's dropout layer does.
    torch_state: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        torch_state["cuda"] = torch.cuda.get_rng_state()
    return {"streams": run.streams.state_dict(), "torch": torch_state}


# -- beside the training --------------------------------------------------------------------------


@define(eq=False)
class SnapshotBuffers:
    """CPU memory that the tensors of one save after another are copied into."""

    _kept: dict[tuple[Path, str], Tensor] = field(factory=dict)

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """Copy ``snapshot``, so that training does not change its tensors.

        The next call overwrites this copy. Buffers of tensors that the snapshot does not have any
        more are freed.
        """
        # Documents stay as they are: `pack` built them anew, and nothing of the run's is in them.
        before, self._kept = self._kept, {}
        copied = evolve(
            snapshot,
            by_rank0=self._copy_shards(snapshot.by_rank0, before),
            by_all_ranks=self._copy_shards(snapshot.by_all_ranks, before),
            by_this_rank={
                path: (value, self._copy_shards({path: shard}, before)[path])
                for path, (value, shard) in snapshot.by_this_rank.items()
            },
        )
        of_this_rank = [shard for _, shard in snapshot.by_this_rank.values()]
        shards = [*snapshot.by_rank0.values(), *snapshot.by_all_ranks.values(), *of_this_rank]
        if any(tensor.is_cuda for shard in shards for tensor in shard.local.values()):
            # Copies to pinned memory are only queued, and the next step writes to their source.
            torch.cuda.synchronize()
        return copied

    @torch.no_grad()
    def _copy_shards(
        self, shards: Mapping[Path, LocalShard], before: dict[tuple[Path, str], Tensor]
    ) -> dict[Path, LocalShard]:
        copies: dict[Path, LocalShard] = {}
        for path, shard in shards.items():
            local = {}
            for name, tensor in shard.local.items():
                buffer = before.pop((path, name), None)
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(
                        tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                    )
                buffer.copy_(tensor, non_blocking=tensor.is_cuda)
                local[name] = self._kept[path, name] = buffer
            copies[path] = LocalShard(local, shard.items)
        return copies


@define(eq=False)
class BackgroundJob:
    """One job at a time, on a thread of its own; its error is raised to whoever waits.

    Not ``torch.distributed.checkpoint.async_save``: its future is over when one state's files are
    written, and a checkpoint here is many states, then a manifest, then a rename.
    """

    _thread: threading.Thread | None = None
    _error: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a job is over, with an error that has not been raised yet."""
        is_running = self._thread is not None and self._thread.is_alive()
        return self._error is not None and not is_running

    def start(self, job: Callable[[], object]) -> None:
        """Start ``job``; the one before has been waited for."""
        assert self._thread is None

        def run() -> None:
            try:
                job()
            except BaseException as error:  # a KeyboardInterrupt goes to the main thread
                self._error = error

        # Not a daemon: a process that ends waits for it.
        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until no job is under way.

        Raises:
            BaseException: the job's error, once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
