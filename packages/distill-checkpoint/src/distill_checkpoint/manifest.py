"""The manifest: written last, it says what a whole checkpoint holds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attrs import field, frozen

from distill_checkpoint.files import FileFacts, files_below, read_json, sha256, write_json

NAME = "manifest.json"
FORMAT = "distill-checkpoint"
VERSION = 2


@frozen(kw_only=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        iteration: the last finished iteration.
        files: every other file of the folder, by its name relative to it.
        metrics: measured in that iteration: what ``keep_best`` compares.
    """

    iteration: int
    files: Mapping[str, FileFacts]
    metrics: Mapping[str, float] = field(factory=dict)


def write_manifest(
    folder: Path,
    iteration: int,
    files: Mapping[str, FileFacts],
    metrics: Mapping[str, float] | None = None,
) -> Manifest:
    """Write down what ``folder`` holds.

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
    write_json(folder / NAME, {**body, "digest": _digest(body)})
    return _manifest(body)


def is_checkpoint(path: Path | str) -> bool:
    """Whether ``path`` is a checkpoint folder of this package, whole or damaged."""
    folder = Path(path)
    if (folder / NAME).is_file():
        try:
            raw = read_json(folder / NAME)
        except (OSError, ValueError):
            return (folder / "loop.json").is_file()
        return isinstance(raw, dict) and raw.get("format") == FORMAT
    return (folder / "loop.json").is_file()


@frozen(kw_only=True)
class Finding:
    """What ``inspect`` found: a manifest that the folder agrees with, or why there is none."""

    manifest: Manifest | None = None
    damage: str | None = None


def inspect(folder: Path, *, checksums: bool) -> Finding:
    """Compare ``folder`` with its manifest. Never raises for a bad folder.

    Args:
        checksums: read every file and compare its sha256 too; else only names and sizes.
    """
    try:
        manifest = _read(folder)
        _compare(folder, manifest)
    except _NotWholeError as error:
        return Finding(damage=str(error))
    except OSError as error:
        return Finding(damage=f"it cannot be read ({error})")
    damage = damaged(folder, manifest.files) if checksums else None
    return Finding(damage=damage) if damage else Finding(manifest=manifest)


def damaged(folder: Path, files: Mapping[str, FileFacts]) -> str | None:
    """Why not every byte of ``files`` in ``folder`` is as it was written; None: all are."""

    def look(name: str) -> str | None:
        try:
            if sha256(folder / name) == files[name].sha256:
                return None
        except OSError as error:
            return f"{name} cannot be read ({error})"
        return f"{name} is damaged (its sha256 is not the one written)"

    # Hashing lets go of the interpreter lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return next((reason for reason in pool.map(look, files) if reason), None)


class _NotWholeError(Exception):
    """Carries the reason from where it is found to ``inspect``."""


def _compare(folder: Path, manifest: Manifest) -> None:
    present = set(files_below(folder)) - {NAME}
    missing = sorted(set(manifest.files) - present)
    if missing:
        raise _NotWholeError(f"{', '.join(missing)} is missing")
    # The safetensors reader takes every such file in a folder, so a stray one would be loaded.
    stray = sorted(name for name in present - set(manifest.files) if name.endswith(".safetensors"))
    if stray:
        raise _NotWholeError(f"{', '.join(stray)} is not in its manifest")
    for name, facts in manifest.files.items():
        size = (folder / name).stat().st_size
        if size != facts.size:
            raise _NotWholeError(f"{name} has {size} bytes where {facts.size} were written")


def _read(folder: Path) -> Manifest:
    try:
        raw = read_json(folder / NAME)
    except (FileNotFoundError, NotADirectoryError):
        raise _NotWholeError(f"it has no {NAME}, which is written last") from None
    except ValueError as error:
        raise _NotWholeError(f"{NAME} is damaged ({error})") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise _NotWholeError(f"{NAME} is not a manifest of {FORMAT}")
    body = {key: value for key, value in raw.items() if key != "digest"}
    if raw.get("digest") != _digest(body):
        raise _NotWholeError(f"{NAME} is damaged (its digest is not the one written)")
    if raw["version"] != VERSION:
        raise _NotWholeError(
            f"its format is version {raw['version']}, and this release reads version {VERSION}"
        )
    return _manifest(body)


def _manifest(body: Mapping[str, Any]) -> Manifest:
    return Manifest(
        iteration=body["iteration"],
        files={name: FileFacts(**facts) for name, facts in body["files"].items()},
        metrics=body["metrics"],
    )


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
