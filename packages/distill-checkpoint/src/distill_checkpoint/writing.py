"""A checkpoint that no run of ours saved: what a migration makes of foreign weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from distill_protocols import CheckpointError, TensorInfo, WeightSource
from torch import Tensor

from distill_checkpoint.commit import new_staging, publish
from distill_checkpoint.files import FileFacts, discarded_on_error, write_json
from distill_checkpoint.layout import Part, part_path, role_folder
from distill_checkpoint.manifest import write_manifest
from distill_checkpoint.safetensors_file import write_safetensors
from distill_checkpoint.tensors import SHARD_BYTES, shard_name
from distill_checkpoint.values import pack

EMPTY: Mapping[Part, WeightSource] = {}


def write_weights_checkpoint(
    folder: Path | str,
    *,
    iteration: int,
    roles: Mapping[Part, WeightSource],
    ema: Mapping[Part, WeightSource] = EMPTY,
    moments: Mapping[Part, WeightSource] | None = None,
    config: Mapping[str, Any],
    origin: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the new checkpoint ``folder``, whole or not at all, one tensor in memory at a time.

    It has weights only: no update counts, generators or data position. So no run resumes from it,
    and ``models.<role>.init_from``, exports and ``StoredCheckpoint`` read it like any other.

    Args:
        iteration: of the run that made the weights; 0 where nobody knows.
        roles: by (role, module).
        ema: the same of averages; each of a module in ``roles``.
        moments: of optimizers, under names of the migration's own. Kept for whoever wants them.
        config: of the run that made them, as far as it is known (JSON-able).
        origin: what was migrated, for messages.

    Raises:
        CheckpointError: ``folder`` exists, an average is of no role, or it cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(
            f"{folder} exists, and a checkpoint is never written over what is there, because that "
            "may be the only copy. Move it away, or choose another folder."
        )
    extra = [".".join(part) for part in ema.keys() - roles.keys()]
    if extra:
        raise CheckpointError(
            f"{origin}: EMA of {', '.join(sorted(extra))} without live weights; an average is read "
            "by the names of its module's weights. Give the module as a role too."
        )
    try:
        staging = new_staging(folder)
        with discarded_on_error(staging):
            files = _Written(staging, shard_bytes)
            for part, source in roles.items():
                files.tensors(role_folder(staging, *part), source)
            for part, source in ema.items():
                files.state(part_path(staging, "ema", *part), source)
            for part, source in (moments or {}).items():
                files.tensors(part_path(staging, "optimizers", *part), source)
            files.json(staging / "config.json", dict(config))
            loop = {
                "iteration": iteration,
                "origin": origin,
                "ranks": 0,
                "roles": [list(part) for part in roles],
                "optimizers": [list(part) for part in moments or {}],
                "schedulers": [],
                "ema": [list(part) for part in ema],
                "callbacks": {},
            }
            files.json(staging / "loop.json", loop)
            write_manifest(staging, iteration, files.facts)
            publish(staging, folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written: {error}. Nothing of it was left behind. Make room or "
            "choose another folder, and start again."
        ) from error


class _Written:
    """Files below one folder, with what they were when they were written."""

    def __init__(self, root: Path, shard_bytes: int) -> None:
        self.facts: dict[str, FileFacts] = {}
        self._root = root
        self._shard_bytes = shard_bytes

    def json(self, path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._note(path, write_json(path, value))

    def tensors(self, folder: Path, source: WeightSource) -> None:
        self._tensors(folder, source, source.describe())

    def state(self, path: Path, source: WeightSource) -> None:
        """As a saved average: 0-d tensors in JSON, and the others beside it."""
        facts = source.describe()
        scalars = source.read([name for name, fact in facts.items() if not fact.size])
        others = {name: fact for name, fact in facts.items() if fact.size}
        hollow = {n: torch.empty(f.size, dtype=f.dtype, device="meta") for n, f in others.items()}
        packed, _ = pack(scalars | hollow, source.where)
        self.json(path.with_name(f"{path.name}.json"), packed)
        self._tensors(path, source, others)

    def _tensors(self, folder: Path, source: WeightSource, facts: Mapping[str, TensorInfo]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shards = _shards(facts, self._shard_bytes)
        for number, names in enumerate(shards, start=1):
            path = folder / shard_name(0, number, len(shards))
            parts = {name: facts[name] for name in names}
            self._note(path, write_safetensors(path, parts, _reader(source, facts)))

    def _note(self, path: Path, facts: FileFacts) -> None:
        self.facts[path.relative_to(self._root).as_posix()] = facts


def _reader(source: WeightSource, facts: Mapping[str, TensorInfo]) -> Any:
    def read(name: str) -> Tensor:
        tensor = source.read([name])[name]
        found = TensorInfo(tuple(tensor.shape), tensor.dtype)
        if found != facts[name]:
            raise CheckpointError(
                f"{source.where}: {name} is {found}, and describe() said {facts[name]}; the file "
                "would not hold what its header says. The source is at problem."
            )
        return tensor

    return read


def _shards(facts: Mapping[str, TensorInfo], most: int) -> list[list[str]]:
    shards: list[list[str]] = []
    filled = most
    for name, fact in facts.items():
        if not shards or filled + fact.nbytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += fact.nbytes
    return shards
