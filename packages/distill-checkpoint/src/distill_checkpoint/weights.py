"""Weights out of a checkpoint and into one, without the run: for exports, warm starts, migrations.

``StoredCheckpoint`` reads roles from any checkpoint; ``write_weights_checkpoint`` writes one that
no run of ours saved.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from distill_protocols import (
    CheckpointError,
    ContractError,
    FamilyPlugin,
    RoleSpec,
    TensorInfo,
    WeightSource,
)
from distill_runtime import (
    FileInfo,
    UnreadableFileError,
    claim_folder,
    read_json,
    write_safetensors,
)
from torch import Tensor

from distill_checkpoint.manifest import (
    CONFIG,
    LOOP,
    Contents,
    Manifest,
    ModuleKey,
    find_damage,
    inspect,
    is_checkpoint_folder,
    json_of,
    read_config,
    role_folder,
    state_path,
    write_json,
    write_manifest,
)
from distill_checkpoint.output_folder import hold_checkpoint, new_staging_folder, publish
from distill_checkpoint.state_dicts import pack, unpack
from distill_checkpoint.tensors import SHARD_BYTES, StoredTensors, shard_name, sharding_metadata

# -- reading --------------------------------------------------------------------------------------


@frozen(eq=False)
class StoredCheckpoint:
    """One intact checkpoint, to read roles from. Nothing but small JSON is read to open it.

    While it or a source of it is there, the run that saved it does not delete it.

    Attributes:
        folder: where it is.
        iteration: the last finished one.
        config: the resolved run file of the run that saved it.
        roles: its trained roles' modules, by role. Frozen roles are not in a checkpoint.
        averaged: the same for roles of which an average (EMA) is kept.
        origin: what it was migrated from; None: a run saved it.
    """

    folder: Path
    iteration: int
    config: Mapping[str, object]
    roles: Mapping[str, tuple[str, ...]]
    averaged: Mapping[str, tuple[str, ...]]
    origin: str | None
    _files: _VerifiedFiles

    @classmethod
    def open(cls, folder: Path | str) -> StoredCheckpoint:
        """Compare ``folder`` with its manifest by names and sizes, and read what it lists.

        Raises:
            CheckpointError: it is no intact checkpoint.
        """
        folder = Path(folder)
        held = hold_checkpoint(folder)
        inspection = inspect(folder, checksums=False)
        if inspection.manifest is None:
            if held is not None:
                held.close()
            raise _not_intact(folder, inspection.damage)
        files = _VerifiedFiles(folder, inspection.manifest)
        if held is not None:
            # Sources may outlive this object, and have the files.
            weakref.finalize(files, held.close)
        files.verify([folder / LOOP, folder / CONFIG])
        try:
            contents, config = Contents.read(folder), read_config(folder)
        except UnreadableFileError as error:  # deleted since: its run keeps only the newest
            raise _not_intact(folder, str(error)) from error
        return cls(
            folder,
            contents.iteration,
            config,
            contents.by_role("roles"),
            contents.by_role("ema"),
            contents.origin,
            files,
        )

    def weights(self, role: str, *, ema: bool = False) -> dict[str, WeightSource]:
        """Return sources of one role by module, under the names of ``RoleHandle.moving_state``.

        A source checks the sha256 of the files that it reads from, once, and of no others.

        Args:
            ema: the average instead of the live weights.

        Raises:
            CheckpointError: no such role, or no average of it (with what there is).
        """
        if role not in self.roles:
            raise CheckpointError(
                f"{self.folder} has no role {role!r} (roles: {_listed(self.roles)}). A checkpoint "
                "holds the roles that were trained; a frozen one is what its own path states. Name "
                "one of these."
            )
        missing = sorted(set(self.roles[role]) - set(self.averaged.get(role, ())))
        if ema and missing:
            raise CheckpointError(
                f"{self.folder} has no EMA of {role!r}, {', '.join(missing)} (EMA of: "
                f"{_listed(self.averaged)}), as its run did not average that role. Take the live "
                "weights (ema: false), or another role."
            )
        return {key: self._source(role, key, ema) for key in self.roles[role]}

    def _source(self, role: str, key: str, ema: bool) -> WeightSource:
        where = f"{self.folder}: {role}.{key}{' (EMA)' if ema else ''}"
        stored = StoredTensors(role_folder(self.folder, role, key))
        live = StoredWeights(where, self._files, stored, None, {})
        if not ema:
            return live
        path = state_path(self.folder, "ema", role, key)
        state = unpack(self._files.read_json(json_of(path)), _TensorNames())
        # An average's state holds more than weights, such as how often it was updated.
        average = {name: state[name] for name in live.describe() if name in state}
        names = {name: v.stored for name, v in average.items() if isinstance(v, _StoredName)}
        scalars = {name: v for name, v in average.items() if isinstance(v, Tensor)}
        return StoredWeights(where, self._files, StoredTensors(path), names, scalars)


@frozen(eq=False)
class StoredWeights(WeightSource):
    """The ``WeightSource`` of one module in a checkpoint.

    Attributes:
        where: for messages.
    """

    where: str  # type: ignore[override]
    _files: _VerifiedFiles
    _stored: StoredTensors
    _names: Mapping[str, str] | None
    """By own name, the name in the files; None: they are the same."""
    _scalars: Mapping[str, Tensor]
    """0-d tensors, which are in JSON."""

    def describe(self) -> Mapping[str, TensorInfo]:
        """Read the headers of the files."""
        stored = self._stored.infos
        if self._names is None and not self._scalars:
            return stored
        own = stored if self._names is None else {n: stored[t] for n, t in self._names.items()}
        return {**own, **{n: TensorInfo((), value.dtype) for n, value in self._scalars.items()}}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors of ``names`` on the CPU; peak memory is theirs.

        Raises:
            CheckpointError: no such name, or a file that they are in is damaged.
        """
        names = list(names)
        self._require(names)
        stored_names = {n: self._stored_name(n) for n in names if n not in self._scalars}
        if stored_names:
            self._files.verify(self._stored.files_of(stored_names.values()))
        stored = self._stored.read(stored_names.values()) if stored_names else {}
        return {
            name: self._scalars[name] if name in self._scalars else stored[stored_names[name]]
            for name in names
        }

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows alone; but the sha256 of all their files is checked, as for ``read``.

        Raises:
            CheckpointError: as ``read``.
        """
        self._require([name])
        stored_name = self._stored_name(name)
        self._files.verify(self._stored.files_of([stored_name]))
        return self._stored.read_rows(stored_name, start, stop)

    def _stored_name(self, name: str) -> str:
        return name if self._names is None else self._names.get(name, name)

    def _require(self, names: Sequence[str]) -> None:
        unknown = sorted(set(names) - self.describe().keys())
        if unknown:
            raise CheckpointError(
                f"{self.where} has no {', '.join(unknown[:5])}"
                f"{' ...' if len(unknown) > 5 else ''} ({len(unknown)} of {len(names)} names); "
                "it holds what describe() lists. Ask for these only."
            )


@frozen
class _StoredName:
    """Stands for a tensor whose name in the files is to be known, and not its numbers."""

    stored: str


class _TensorNames(Mapping[str, Any]):
    """Tensors for ``unpack``: instead of each, its name."""

    def __getitem__(self, name: str) -> _StoredName:
        return _StoredName(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


@frozen(eq=False)
class _VerifiedFiles:
    """A checkpoint's files: each is compared with its sha256 before it is first read."""

    _folder: Path
    _manifest: Manifest
    _verified: set[str] = field(init=False, factory=set)

    def verify(self, paths: Iterable[Path]) -> None:
        """Compare those of ``paths`` that were not compared before.

        Raises:
            CheckpointError: one is damaged, or the manifest does not know it.
        """
        names = {path.relative_to(self._folder).as_posix() for path in paths} - self._verified
        unknown = sorted(names - self._manifest.files.keys())
        if unknown:
            raise _not_intact(self._folder, f"{', '.join(unknown)} is not in its manifest")
        damage = find_damage(self._folder, {name: self._manifest.files[name] for name in names})
        if damage:
            raise _not_intact(self._folder, damage)
        self._verified.update(names)

    def read_json(self, path: Path) -> Any:
        self.verify([path])
        try:
            return read_json(path)
        except UnreadableFileError as error:  # deleted since: its run keeps only the newest
            raise _not_intact(self._folder, str(error)) from error


def _not_intact(folder: Path, damage: str | None) -> CheckpointError:
    return CheckpointError(
        f"{folder} is not an intact checkpoint: {damage}. Nothing of it is used, because damaged "
        "weights look like any others. Take another checkpoint of the run."
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def read_start_weights(
    path: str, role: str, *, ema: bool, family: FamilyPlugin[Any], spec: RoleSpec
) -> Mapping[str, WeightSource]:
    """Open the weights in ``path``, by module.

    Args:
        path: a checkpoint's folder, or whatever the family reads (``start_weights``).
            Folders are absolute, so that no folder is taken for a hub id.
        role: which role of a checkpoint.
        ema: a checkpoint's averaged weights instead of its live ones.
        spec: the role that starts with them.

    Raises:
        DistillError: there are none, or they are damaged.
    """
    folder = Path(path)
    if folder.is_absolute() and is_checkpoint_folder(folder):
        return StoredCheckpoint.open(folder).weights(role, ema=ema)
    return family.start_weights(spec, path)


# -- writing --------------------------------------------------------------------------------------

_NO_AVERAGES: Mapping[ModuleKey, WeightSource] = {}


def write_weights_checkpoint(
    folder: Path | str,
    *,
    iteration: int,
    roles: Mapping[ModuleKey, WeightSource],
    ema: Mapping[ModuleKey, WeightSource] = _NO_AVERAGES,
    moments: Mapping[ModuleKey, WeightSource] | None = None,
    config: Mapping[str, object],
    origin: str,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the new checkpoint ``folder``, complete or not at all, one tensor in memory at a time.

    It has weights only: no update counts, generators or data position. So no run resumes from it,
    and warm starts, exports and ``StoredCheckpoint`` read it like any other.

    Args:
        iteration: of the run that made the weights; 0 where nobody knows.
        roles: by (role, module).
        ema: the same of averages; each of a module in ``roles``.
        moments: of optimizers, under names of the migration's own. Kept for whoever wants them.
        config: of the run that made them, as far as it is known (JSON-able).
        origin: what was migrated, for messages.

    Raises:
        CheckpointError: ``folder`` exists, an average is of no role, a source is not what it
            describes, or it cannot be written.
        OutputError: another process is writing it.
    """
    folder = Path(folder)
    if folder.exists():
        raise CheckpointError(
            f"{folder} exists, and a checkpoint is never written over what is there, because that "
            "may be the only copy. Move it away, or choose another folder."
        )
    extra = sorted(f"{role}.{module}" for role, module in ema.keys() - roles.keys())
    if extra:
        raise CheckpointError(
            f"{origin}: EMA of {', '.join(extra)} without live weights; an average is read "
            "by the names of its module's weights. Give the module as a role too."
        )
    contents = Contents(
        iteration=iteration,
        origin=origin,
        ranks=0,
        modules={
            "roles": tuple(roles),
            "optimizers": tuple(moments or ()),
            "schedulers": (),
            "ema": tuple(ema),
        },
        callbacks={},
    )
    try:
        # Or two migrations into one folder would each clear the other's staging folder away.
        with claim_folder(folder.parent, folder.name):
            staging = new_staging_folder(folder)
            try:
                files = _FilesWritten(staging, shard_bytes)
                for key, source in roles.items():
                    files.write_tensors(role_folder(staging, *key), source, source.describe())
                for key, source in ema.items():
                    files.write_state(state_path(staging, "ema", *key), source)
                for key, source in (moments or {}).items():
                    path = state_path(staging, "optimizers", *key)
                    files.write_tensors(path, source, source.describe())
                files.write_json(staging / CONFIG, dict(config))
                files.write_json(staging / LOOP, contents.as_json())
                write_manifest(staging, iteration, files.infos)
                publish(staging, folder)
            except BaseException:
                # The error under way is the one to report, not that of clearing up behind it.
                shutil.rmtree(staging, ignore_errors=True)
                raise
    except (OSError, ContractError) as error:
        raise CheckpointError(
            f"{folder} could not be written: {error}. Nothing of it was left behind. Make room, "
            "mend the source or choose another folder, and start again."
        ) from error


class _FilesWritten:
    """Files below one folder, each with its size and checksum as it was written."""

    def __init__(self, root: Path, shard_bytes: int) -> None:
        self.infos: dict[str, FileInfo] = {}
        self._root = root
        self._shard_bytes = shard_bytes

    def write_json(self, path: Path, value: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._add(path, write_json(path, value))

    def write_state(self, path: Path, source: WeightSource) -> None:
        """Write a source as an average is saved: 0-d tensors in JSON, the others beside it."""
        infos = source.describe()
        scalars = source.read([name for name, info in infos.items() if not info.size])
        others = {name: info for name, info in infos.items() if info.size}
        # `pack` wants tensors, but names alone are needed: on the meta device they take no memory.
        empty = {n: torch.empty(i.size, dtype=i.dtype, device="meta") for n, i in others.items()}
        packed, _ = pack(scalars | empty, source.where)
        self.write_json(json_of(path), packed)
        self.write_tensors(path, source, others)

    def write_tensors(
        self, folder: Path, source: WeightSource, infos: Mapping[str, TensorInfo]
    ) -> None:
        """Write the tensors of ``infos`` into files of at most ``shard_bytes``."""
        folder.mkdir(parents=True, exist_ok=True)
        shards: list[list[str]] = []
        filled = self._shard_bytes
        for name, info in infos.items():
            if not shards or filled + info.nbytes > self._shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += info.nbytes
        for number, names in enumerate(shards, start=1):
            path = folder / shard_name(0, number, len(shards))
            file_info = write_safetensors(
                path,
                {name: infos[name] for name in names},
                lambda name: source.read([name])[name],
                metadata=sharding_metadata({name: (0,) * len(infos[name].size) for name in names}),
            )
            self._add(path, file_info)

    def _add(self, path: Path, info: FileInfo) -> None:
        self.infos[path.relative_to(self._root).as_posix()] = info
