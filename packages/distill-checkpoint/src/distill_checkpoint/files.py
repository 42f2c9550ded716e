"""Files that are really on the disk, and folders that vanish in one step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import frozen


@frozen(kw_only=True)
class FileFacts:
    """What one file was when it was written."""

    size: int
    sha256: str


def write_json(path: Path, value: Any) -> FileFacts:
    """``value`` as JSON, on the disk when this returns. Not atomic: meant for staging folders."""
    text = f"{json.dumps(value, indent=1, allow_nan=False)}\n".encode()
    with path.open("xb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return FileFacts(size=len(text), sha256=hashlib.sha256(text).hexdigest())


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def files_below(folder: Path) -> Iterator[str]:
    """Names of all files below ``folder``, relative to it, with forward slashes, sorted."""
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            yield path.relative_to(folder).as_posix()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Put the names in ``folder`` on the disk: a file that was fsynced can still lack its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """``sync_folder`` for ``folder`` and all below it, the deepest first."""
    for below, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(below))


def remove_folder(folder: Path) -> None:
    """Delete ``folder`` under a dot name, so that nobody ever sees it half deleted."""
    doomed = folder.with_name(f".deleted-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


@contextlib.contextmanager
def discarded_on_error(folder: Path) -> Iterator[None]:
    """Remove what is in ``folder`` if the block raises; the error goes on."""
    try:
        yield
    except BaseException:
        # The error under way is the one to hear of, not that of clearing up behind it.
        shutil.rmtree(folder, ignore_errors=True)
        raise
