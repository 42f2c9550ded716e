"""What a checkpoint holds, where, and whether its folder is as it was written. No torch here.

::

    checkpoint-000400/
      manifest.json                     sizes and checksums; written last
      config.json                       the resolved run file
      loop.json                         iteration, and which of everything below there is
      method.json                       update counts and loss scaler
      loader{/,.json}                   data position, by rank
      roles/<role>/<module>/            safetensors under the module's own names
      optimizers/<role>.<module>{/,.json}
      schedulers/<role>.<module>{/,.json}
      ema/<role>.<module>{/,.json}
      callbacks/<name>{/,.json}
      rng{/,.json}                      generator states, by rank

State that has a folder and a ``.json`` has its tensors in the one and the rest in the other
(``state_dicts.py``); state without tensors has no folder.

``manifest.json`` is written last: names, sizes and sha256 of every other file, so that a folder
that agrees with it is intact. ``loop.json`` lists which state there is. Either may be damaged in
any manner, by a disk or by hand, and none of it may end in another error than "it is not intact".
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from attrs import field, frozen
from distill_protocols import Problem
from distill_runtime import (
    FileInfo,
    UnreadableFileError,
    as_count,
    as_text,
    files_below,
    json_text,
    parse_json,
    read_json_object,
    sha256_of_file,
    write_new_file,
)

ModuleKey = tuple[str, str]
"""(role, module)."""

MANIFEST = "manifest.json"
LOOP = "loop.json"
CONFIG = "config.json"

FORMAT = "distill-checkpoint"
VERSION = 2

_FIRST_OBSERVERS = ("metrics",)
"""Of checkpoints that do not say which of their callbacks only observe: the trainer's own."""

KINDS = ("roles", "optimizers", "schedulers", "ema")
"""The kinds of state that modules of roles have, as ``loop.json`` and the folders call them."""


# -- files in a checkpoint ------------------------------------------------------------------------


def as_file_name(name: str) -> str:
    """``name`` as one file name, different for different names: any string may name a role."""
    # A dot separates role from module, and ".." would leave the folder.
    return quote(name, safe=" ").replace(".", "%2E") or "%"


def role_folder(checkpoint: Path, role: str, module: str) -> Path:
    """Return the folder of one module's weights."""
    return checkpoint / "roles" / as_file_name(role) / as_file_name(module)


def state_path(checkpoint: Path, kind: str, *names: str) -> Path:
    """Return the path without suffix of one state of ``kind``: ``state_path(c, "ema", role,
    module)``."""
    return checkpoint / kind / ".".join(as_file_name(name) for name in names)


def method_path(checkpoint: Path, rank: int) -> Path:
    """Return the path without suffix of what the method moves on one rank."""
    return checkpoint / "method_ranks" / rank_key(rank)


def json_of(state: Path) -> Path:
    """Return the JSON file of the state at ``state_path``."""
    return state.with_name(f"{state.name}.json")


def rank_key(rank: int) -> str:
    """Return the key of a rank's own states in ``loader`` and ``rng``."""
    return f"rank-{rank:05d}"


# -- what is in it --------------------------------------------------------------------------------


@frozen(kw_only=True)
class Manifest:
    """The files of an intact checkpoint.

    Attributes:
        iteration: the last finished iteration.
        files: every other file of the folder, by its name relative to it.
        metrics: measured in that iteration: what ``keep_best`` compares.
    """

    iteration: int
    files: Mapping[str, FileInfo]
    metrics: Mapping[str, float] = field(factory=dict)


@frozen(kw_only=True)
class Contents:
    """Which state a checkpoint holds: ``loop.json``.

    Attributes:
        iteration: the last finished iteration.
        modules: by kind of ``KINDS``, the modules that have such state.
        callbacks: by name, whether the callback has state.
        origin: what the weights were migrated from; None: a run saved them, and can go on.
        ranks: how many saved it.
        micro_steps: forward and backward passes so far; None in a checkpoint of weights alone.
        added, dropped: the ``ChangesConfig`` under which it was saved.
        observers: callbacks without which a run trains just the same (``Callback.only_observes``).
    """

    iteration: int
    modules: Mapping[str, tuple[ModuleKey, ...]]
    callbacks: Mapping[str, bool]
    origin: str | None
    ranks: int
    micro_steps: int | None = None
    added: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    observers: tuple[str, ...] = ()

    @classmethod
    def read(cls, checkpoint: Path) -> Contents:
        """Read them from the folder of a checkpoint.

        Raises:
            UnreadableFileError: ``loop.json`` is missing, damaged or incomplete.
        """
        value: dict[str, Any] = read_json_object(checkpoint / LOOP)
        try:
            changes = value.get("changes", {"added": (), "dropped": ()})
            return cls(
                iteration=as_count(value["iteration"]),
                modules={kind: tuple(map(_module_key, value[kind])) for kind in KINDS},
                callbacks={name: _flag(has) for name, has in value["callbacks"].items()},
                origin=None if value["origin"] is None else as_text(value["origin"]),
                ranks=as_count(value["ranks"]),
                micro_steps=as_count(value["micro_steps"]) if "micro_steps" in value else None,
                added=tuple(map(as_text, changes["added"])),
                dropped=tuple(map(as_text, changes["dropped"])),
                observers=tuple(map(as_text, value.get("observers", _FIRST_OBSERVERS))),
            )
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UnreadableFileError(
                f"{checkpoint / LOOP} is damaged ({type(error).__name__}: {error})"
            ) from error

    def as_json(self) -> dict[str, object]:
        """Return the object that ``loop.json`` holds."""
        of_a_run = {
            "micro_steps": self.micro_steps,
            "changes": {"added": list(self.added), "dropped": list(self.dropped)},
        }
        return {
            "iteration": self.iteration,
            "origin": self.origin,
            **(of_a_run if self.origin is None else {}),
            "ranks": self.ranks,
            **{kind: [list(key) for key in self.modules.get(kind, ())] for kind in KINDS},
            "callbacks": dict(self.callbacks),
            "observers": list(self.observers),
        }

    def by_role(self, kind: str) -> dict[str, tuple[str, ...]]:
        """Return the modules that have state of ``kind``, by role."""
        roles: dict[str, tuple[str, ...]] = {}
        for role, module in self.modules[kind]:
            roles[role] = (*roles.get(role, ()), module)
        return roles


def write_json(path: Path, value: Mapping[str, object] | Sequence[object]) -> FileInfo:
    """Write a new JSON file of a checkpoint; its bytes are on the disk when this returns."""
    text = json_text(value, indent=1)
    # What a reader would refuse must fail now, and not when the run is resumed.
    parse_json(text, str(path))
    return write_new_file(path, text.encode())


def write_manifest(
    folder: Path,
    iteration: int,
    files: Mapping[str, FileInfo],
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write down which files ``folder`` holds.

    Args:
        files: as they were when they were written: a checksum of what was meant to be there, not
            of what a disk may have made of it.
    """
    body = {
        "format": FORMAT,
        "version": VERSION,
        "iteration": iteration,
        "metrics": dict(metrics or {}),
        "files": {n: {"size": f.size, "sha256": f.sha256} for n, f in sorted(files.items())},
    }
    write_json(folder / MANIFEST, {**body, "digest": _digest(body)})


# -- is it intact ---------------------------------------------------------------------------------


@frozen(kw_only=True)
class Inspection:
    """The result of ``inspect``: a manifest that the folder agrees with, or why there is none."""

    manifest: Manifest | None = None
    damage: str | None = None


def inspect(folder: Path, *, checksums: bool) -> Inspection:
    """Compare ``folder`` with its manifest. Never raises for a bad folder.

    Args:
        checksums: read every file and compare its sha256 too; else only names and sizes.
    """
    try:
        manifest = _read_manifest(folder)
        _compare_names_and_sizes(folder, manifest)
    except (_NotIntactError, UnreadableFileError) as error:
        return Inspection(damage=str(error))
    except OSError as error:
        return Inspection(damage=f"it cannot be read ({error})")
    damage = find_damage(folder, manifest.files) if checksums else None
    return Inspection(damage=damage) if damage else Inspection(manifest=manifest)


def find_damage(folder: Path, files: Mapping[str, FileInfo]) -> str | None:
    """Compare every byte of ``files`` in ``folder`` with its sha256.

    Returns:
        Which file is not as it was written; None: all are.
    """

    def compare(name: str) -> str | None:
        try:
            if sha256_of_file(folder / name) == files[name].sha256:
                return None
        except OSError as error:
            return f"{name} cannot be read ({error})"
        return f"{name} is damaged (its sha256 is not the one written)"

    # Hashing releases the interpreter lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return next((reason for reason in pool.map(compare, files) if reason), None)


class _NotIntactError(Exception):
    """Carries the reason from where it is found to ``inspect``."""


def _compare_names_and_sizes(folder: Path, manifest: Manifest) -> None:
    present = set(files_below(folder)) - {MANIFEST}
    missing = sorted(set(manifest.files) - present)
    if missing:
        raise _NotIntactError(f"{', '.join(missing)} is missing")
    # The safetensors reader takes every such file in a folder, so a stray one would be loaded.
    stray = sorted(name for name in present - set(manifest.files) if name.endswith(".safetensors"))
    if stray:
        raise _NotIntactError(f"{', '.join(stray)} is not in its manifest")
    for name, info in manifest.files.items():
        size = (folder / name).stat().st_size
        if size != info.size:
            raise _NotIntactError(f"{name} has {size} bytes where {info.size} were written")


def _read_manifest(folder: Path) -> Manifest:
    if not (folder / MANIFEST).is_file():
        raise _NotIntactError(f"it has no {MANIFEST}, which is written last")
    value: dict[str, Any] = read_json_object(folder / MANIFEST)
    if value.get("format") != FORMAT:
        raise _NotIntactError(f"{MANIFEST} is not a manifest of {FORMAT}")
    body = {key: item for key, item in value.items() if key != "digest"}
    if value.get("digest") != _digest(body):
        raise _NotIntactError(f"{MANIFEST} is damaged (its digest is not the one written)")
    if value.get("version") != VERSION:
        raise _NotIntactError(
            f"its format is version {value.get('version')}, and this release reads version "
            f"{VERSION}"
        )
    # The digest shows what a disk did to it, and not what a person or another program wrote.
    try:
        return Manifest(
            iteration=as_count(body["iteration"]),
            files={
                name: FileInfo(size=as_count(entry["size"]), sha256=as_text(entry["sha256"]))
                for name, entry in body["files"].items()
            },
            metrics={name: _number(value) for name, value in body["metrics"].items()},
        )
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise _NotIntactError(f"{MANIFEST} is damaged ({type(error).__name__}: {error})") from error


def _digest(body: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return float(value)


def _module_key(value: Any) -> ModuleKey:
    role, module = value
    if type(role) is not str or type(module) is not str:
        raise ValueError(f"{value!r} is no role and module")
    return role, module


# -- questions that apps ask before torch is there ------------------------------------------------


def is_checkpoint_folder(path: Path | str) -> bool:
    """Return whether ``path`` is a checkpoint folder of this package, intact or damaged."""
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        try:
            return read_json_object(folder / MANIFEST).get("format") == FORMAT
        except UnreadableFileError:
            pass
    return (folder / LOOP).is_file()


def role_problems(checkpoint: Path, role: str, *, ema: bool) -> Iterator[Problem]:
    """Yield what is wrong with taking ``role`` (or its average) out of ``checkpoint``.

    The paths of the problems are ``path``, ``role`` and ``ema``.
    """
    try:
        contents = Contents.read(checkpoint)
    except UnreadableFileError as error:
        yield Problem("path", f"{checkpoint} cannot be read, as {error}; name another checkpoint")
        return
    roles, averaged = contents.by_role("roles"), contents.by_role("ema")
    if role not in roles:
        near = difflib.get_close_matches(role, roles, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        yield Problem(
            "role",
            f"there is no trained role {role!r} in {checkpoint}{hint} (it holds: "
            f"{', '.join(roles) or 'none'}); frozen roles are not saved, they are what their own "
            "path states",
        )
    elif ema and role not in averaged:
        yield Problem(
            "ema",
            f"{checkpoint} holds no average of {role!r} (of: {', '.join(averaged) or 'none'}); "
            "take the live weights",
        )


def read_config(checkpoint: Path) -> dict[str, object]:
    """Return the resolved run file of the run that saved ``checkpoint``.

    Raises:
        UnreadableFileError: ``config.json`` is missing or damaged.
    """
    return read_json_object(checkpoint / CONFIG)
