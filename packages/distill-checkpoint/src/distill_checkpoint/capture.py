"""What of a run is in a checkpoint.

Only trainable roles' weights are saved, and of those only what training moves: the rest is what
its source says, and stays there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from distill_protocols import Callback, CheckpointError, RunState
from distill_runtime import Ranks
from torch import Tensor

from distill_checkpoint.files import FileFacts, write_json
from distill_checkpoint.layout import part_path, rank_key, role_folder
from distill_checkpoint.optimizers import optimizer_state
from distill_checkpoint.parts import averages, kinds, modules, optimizers, schedulers, weights
from distill_checkpoint.tensors import Share, to_whole, write_tensors
from distill_checkpoint.values import pack


@frozen(eq=False)
class Snapshot:
    """Everything that moves in a run, after one iteration; paths are relative to the checkpoint.

    Attributes:
        iteration: the last finished one.
        documents: JSON, written by rank 0.
        own: tensors that rank 0 writes.
        shared: tensors that all ranks write together, each its share.
    """

    iteration: int
    documents: dict[Path, Any] = field(factory=dict)
    own: dict[Path, Share] = field(factory=dict)
    shared: dict[Path, Share] = field(factory=dict)

    def write(self, folder: Path, ranks: Ranks) -> dict[str, FileFacts]:
        """Write it into ``folder``, all ranks together; says what each file is, on every rank.

        Raises:
            CheckpointError: it could not be written on some rank.
        """
        written: dict[Path, FileFacts] = {}
        for path, share in self.shared.items():
            written |= write_tensors(folder / path, share, ranks=ranks)

        def rest() -> dict[str, FileFacts]:
            for path, share in self.own.items() if ranks.is_first else ():
                written.update(write_tensors(folder / path, share))
            for path, value in self.documents.items() if ranks.is_first else ():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                written[folder / path] = write_json(folder / path, value)
            return {path.relative_to(folder).as_posix(): facts for path, facts in written.items()}

        return {name: facts for part in ranks.gather_results(rest) for name, facts in part.items()}

    def add(self, path: Path, state: Any, *, shared: bool = False) -> None:
        """One thing: its tensors under ``path``, the rest in ``path.json``."""
        packed, tensors = pack(state, path.as_posix())
        if tensors and shared:
            self.shared[path] = Share.of(tensors)
        elif tensors:
            self.own[path] = Share.of({name: to_whole(value) for name, value in tensors.items()})
        self.documents[path.with_name(f"{path.name}.json")] = packed


def capture(
    run: RunState, callbacks: Mapping[str, Callback], ranks: Ranks, facts: Mapping[str, Any]
) -> Snapshot:
    """Look at everything that moves in ``run``. Tensors are the run's own, not copies.

    Args:
        facts: what else ``loop.json`` shall say.

    Raises:
        CheckpointError: something on some rank is not what a checkpoint can hold, or they are at
            different iterations.
    """
    snapshot = Snapshot(run.iteration)

    def look() -> dict[str, Any]:
        _add_everything(snapshot, run, callbacks, {**facts, "ranks": ranks.size})
        return {
            "iteration": run.iteration,
            "loader": run.loader.state_dict(),
            "rng": random_state(run),
        }

    by_rank = ranks.gather_results(look)
    _refuse_different([state["iteration"] for state in by_rank])

    def gather() -> None:
        for name in ("loader", "rng"):
            states = {rank_key(rank): state[name] for rank, state in enumerate(by_rank)}
            snapshot.add(Path(name), states)

    ranks.gather_results(gather)
    return snapshot


def _refuse_different(iterations: list[int]) -> None:
    if len(set(iterations)) > 1:
        told = ", ".join(f"rank {rank}: {number}" for rank, number in enumerate(iterations))
        raise CheckpointError(
            f"ranks save different iterations ({told}); a checkpoint is of one, and this would be "
            "put together of several. Whatever ends an iteration early must do so on all ranks: "
            "that is a problem of the method or of a callback"
        )


def _add_everything(
    snapshot: Snapshot, run: RunState, callbacks: Mapping[str, Callback], facts: Mapping[str, Any]
) -> None:
    root = Path()
    bundle = run.method.bundle
    for (role, key), handle in modules(bundle).items():
        tensors = weights(handle, key)
        if tensors:
            snapshot.shared[role_folder(root, role, key)] = Share.of(tensors)
    for (role, key), optimizer in optimizers(bundle).items():
        names = bundle.roles[role].trained_parameters(key)
        state = optimizer_state(optimizer, names, f"{role}.{key}")
        snapshot.add(part_path(root, "optimizers", role, key), state, shared=True)
    for (role, key), scheduler in schedulers(bundle).items():
        snapshot.add(part_path(root, "schedulers", role, key), scheduler.state_dict())
    for (role, key), average in averages(bundle).items():
        snapshot.add(part_path(root, "ema", role, key), average.state_dict(), shared=True)
    states = {name: callback.state_dict() for name, callback in callbacks.items()}
    for name, state in states.items():
        if state:
            snapshot.add(part_path(root, "callbacks", name), state)
    snapshot.add(Path("method"), run.method.state_dict())
    snapshot.documents[Path("loop.json")] = {
        "iteration": run.iteration,
        "micro_steps": run.micro_steps,
        "origin": None,
        **facts,
        **{kind: [list(part) for part in parts] for kind, parts in kinds(bundle).items()},
        "callbacks": {name: bool(state) for name, state in states.items()},
    }


def random_state(run: RunState) -> dict[str, Any]:
    """Of this rank: the run's named generators, and torch's own."""
    # Nothing here draws from torch's own generators; a user's dropout layer does.
    own: dict[str, Tensor] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        own["cuda"] = torch.cuda.get_rng_state()
    return {"streams": run.streams.state_dict(), "torch": own}
