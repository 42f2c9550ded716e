"""The manifest: written last, it says what a whole checkpoint holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from distill_checkpoint.files import files_below, read_json, sha256, write_json

NAME = "manifest.json"
FORMAT = "distill-checkpoint"
VERSION = 1


@frozen(kw_only=True)
class FileFacts:
    """What one file of the checkpoint was when it was written."""

    size: int
    sha256: str


@frozen(kw_only=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        iteration: the last finished iteration.
        files: every other file of the folder, by its name relative to it.
    """

    iteration: int
    files: Mapping[str, FileFacts]


def write_manifest(folder: Path, iteration: int) -> Manifest:
    """Read back every file of ``folder`` and write down its size and checksum."""
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in files_below(folder)
    }
    body = {"format": FORMAT, "version": VERSION, "iteration": iteration, "files": files}
    write_json(folder / NAME, {**body, "digest": _digest(body)})
    return _manifest(body)


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
        _compare(folder, manifest, checksums)
    except _NotWholeError as error:
        return Finding(damage=str(error))
    except OSError as error:
        return Finding(damage=f"it cannot be read ({error})")
    return Finding(manifest=manifest)


class _NotWholeError(Exception):
    """Carries the reason from where it is found to ``inspect``."""


def _compare(folder: Path, manifest: Manifest, checksums: bool) -> None:
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
    for name, facts in manifest.files.items() if checksums else ():
        if sha256(folder / name) != facts.sha256:
            raise _NotWholeError(f"{name} is damaged (its sha256 is not the one written)")


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
    )


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
