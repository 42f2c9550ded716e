"""Weights out of a checkpoint, without the run that made it: for export, warm start, migration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen
from distill_protocols import CheckpointError, TensorInfo, WeightSource
from torch import Tensor

from distill_checkpoint.files import read_json
from distill_checkpoint.layout import part_path, role_folder
from distill_checkpoint.manifest import Manifest, damaged, inspect
from distill_checkpoint.tensors import StoredTensors
from distill_checkpoint.values import unpack


@frozen(eq=False)
class StoredCheckpoint:
    """One whole checkpoint, to read roles from. Nothing but small JSON is read to open it.

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
    config: Mapping[str, Any]
    roles: Mapping[str, tuple[str, ...]]
    averaged: Mapping[str, tuple[str, ...]]
    origin: str | None
    _files: _CheckedFiles

    @classmethod
    def open(cls, folder: Path | str) -> StoredCheckpoint:
        """Compare ``folder`` with its manifest by names and sizes, and read what there is.

        Raises:
            CheckpointError: it is no whole checkpoint.
        """
        folder = Path(folder)
        found = inspect(folder, checksums=False)
        if found.manifest is None:
            raise _not_whole(folder, found.damage)
        files = _CheckedFiles(folder, found.manifest)
        loop = files.json("loop.json")
        return cls(
            folder,
            loop["iteration"],
            files.json("config.json"),
            _by_role(loop["roles"]),
            _by_role(loop["ema"]),
            loop["origin"],
            files,
        )

    def weights(self, role: str, *, ema: bool = False) -> dict[str, WeightSource]:
        """Sources of one role by module, under the names of ``RoleHandle.moving_state``.

        A source checks the sha256 of the files that it reads from, once, and of no others.

        Args:
            ema: the average instead of the live weights.

        Raises:
            CheckpointError: no such role, or no average of it (with what there is).
        """
        if role not in self.roles:
            raise CheckpointError(
                f"{self.folder} has no role {role!r} (roles: {_listed(self.roles)}). A checkpoint "
                "holds the roles that were trained; a frozen one is what its models.<role>.path "
                "says. Name one of these."
            )
        missing = sorted(set(self.roles[role]) - set(self.averaged.get(role, ())))
        if ema and missing:
            raise CheckpointError(
                f"{self.folder} has no EMA of {role!r}, {', '.join(missing)} (EMA of: "
                f"{_listed(self.averaged)}); it was not listed under callbacks.ema.roles. Take the "
                "live weights (ema: false), or another role."
            )
        return {key: self._source(role, key, ema) for key in self.roles[role]}

    def _source(self, role: str, key: str, ema: bool) -> WeightSource:
        where = f"{self.folder}: {role}.{key}{' (EMA)' if ema else ''}"
        stored = StoredTensors(role_folder(self.folder, role, key))
        live = StoredWeights(where, self._files, stored, None, {})
        if not ema:
            return live
        path = part_path(self.folder, "ema", role, key)
        packed = self._files.json(path.relative_to(self.folder).as_posix() + ".json")
        state = unpack(packed, _Names())
        mine = {name: state[name] for name in live.describe() if name in state}
        names = {name: v.stored for name, v in mine.items() if isinstance(v, _Name)}
        scalars = {name: v for name, v in mine.items() if isinstance(v, Tensor)}
        return StoredWeights(where, self._files, StoredTensors(path), names, scalars)


@frozen(eq=False)
class StoredWeights(WeightSource):
    """The ``WeightSource`` of one module in a checkpoint.

    Attributes:
        where: for messages.
    """

    where: str  # type: ignore[override]
    _files: _CheckedFiles
    _stored: StoredTensors
    _names: Mapping[str, str] | None
    """By own name, the name in the files; None: they are the same."""
    _scalars: Mapping[str, Tensor]
    """0-d tensors that stand in JSON."""

    def describe(self) -> Mapping[str, TensorInfo]:
        """From the headers."""
        stored = self._stored.infos
        if self._names is None and not self._scalars:
            return stored
        own = stored if self._names is None else {n: stored[t] for n, t in self._names.items()}
        return {**own, **{n: TensorInfo((), value.dtype) for n, value in self._scalars.items()}}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of ``names`` on the CPU; peak memory is theirs.

        Raises:
            CheckpointError: no such name, or a file that they are in is damaged.
        """
        names = list(names)
        self._require(names)
        there = {name: self._there(name) for name in names}
        wanted = [there[name] for name in names if name not in self._scalars]
        if wanted:
            self._files.check(self._stored.files_of(wanted))
        found = self._stored.read(wanted) if wanted else {}
        return {n: self._scalars[n] if n in self._scalars else found[there[n]] for n in names}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Of the part alone; but the sha256 of its files is checked like that of any other.

        Raises:
            CheckpointError: as ``read``.
        """
        self._require([name])
        self._files.check(self._stored.files_of([self._there(name)]))
        return self._stored.read_rows(self._there(name), start, stop)

    def _there(self, name: str) -> str:
        return name if self._names is None else self._names.get(name, name)

    def _require(self, names: Sequence[str]) -> None:
        unknown = sorted(set(names) - self.describe().keys())
        if unknown:
            raise CheckpointError(
                f"{self.where} has no {', '.join(unknown[:5])}"
                f"{' ...' if len(unknown) > 5 else ''} ({len(unknown)} of {len(names)} names); "
                "it holds what facts() lists. Ask for these only."
            )


@frozen
class _Name:
    stored: str


class _Names(Mapping[str, Any]):
    """Stands in for tensors while their names are looked up."""

    def __getitem__(self, name: str) -> _Name:
        return _Name(name)

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


@frozen(eq=False)
class _CheckedFiles:
    """A checkpoint's files: each is compared with its sha256 before it is first read."""

    _folder: Path
    _manifest: Manifest
    _checked: set[str] = field(init=False, factory=set)

    def check(self, paths: Iterable[Path]) -> None:
        names = {path.relative_to(self._folder).as_posix() for path in paths} - self._checked
        damage = damaged(self._folder, {name: self._manifest.files[name] for name in names})
        if damage:
            raise _not_whole(self._folder, damage)
        self._checked.update(names)

    def json(self, name: str) -> Any:
        self.check([self._folder / name])
        try:
            return read_json(self._folder / name)
        except OSError as error:  # deleted since: its run keeps only the newest
            raise _not_whole(self._folder, f"{name} cannot be read ({error})") from error


def _by_role(parts: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    roles: dict[str, tuple[str, ...]] = {}
    for role, module in parts:
        roles[role] = (*roles.get(role, ()), module)
    return roles


def _not_whole(folder: Path, damage: str | None) -> CheckpointError:
    return CheckpointError(
        f"{folder} is not a whole checkpoint: {damage}. Nothing of it is used, because damaged "
        "weights look like any others. Take another checkpoint of the run."
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
