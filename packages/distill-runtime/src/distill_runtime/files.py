"""Files and folders that appear whole or not at all, and are on the disk then. No torch here.

A rename is atomic only within one file system, so all staging happens beside the target, under a
name that begins with a dot.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from uuid import uuid4

from attrs import frozen
from distill_protocols.exports import SPEC_FILE

DELETED_PREFIX = ".deleted-"
"""What ``remove_folder`` puts before a name; a process that is killed meanwhile leaves it there."""


@frozen(kw_only=True)
class FileInfo:
    """What one file was when it was written."""

    size: int
    sha256: str


def write_new_file(path: Path, content: bytes) -> FileInfo:
    """Write a file that must not be there yet; its bytes are on the disk when this returns.

    Not atomic: meant for files in a folder that nobody reads before it is published. The checksum
    is that of ``content``, not of what a disk may have made of it.

    Raises:
        FileExistsError: there is one of that name.
    """
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return FileInfo(size=len(content), sha256=hashlib.sha256(content).hexdigest())


@contextlib.contextmanager
def naming_file(path: Path | str) -> Iterator[None]:
    """Within: an OSError that names no file (a full disk's does not) names ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def replace_file(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which takes its place when the block ends well.

    It has the same suffix, because writers choose their format by it. The parent folder is made.
    When this returns, the file and its name are on the disk, and whoever may read new files of this
    process may read it. If the block raises, nothing is left behind and the error goes on.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several ranks, perhaps on several hosts, may write the same file at once.
    part = target.with_name(f".{target.stem}.{uuid4().hex}.part{target.suffix}")
    try:
        with naming_file(target):
            yield part
        part.chmod(0o666 & ~_umask())  # safetensors' writer creates files for the owner alone
        sync_file(part)
        part.replace(target)
        sync_folder(target.parent)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(folder: Path, *, only_writer: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``folder``, which takes its place when the block ends well.

    Whatever was in ``folder`` before is gone then; until then it stays as it was. If the block
    raises, nothing is left behind and the error goes on.

    Args:
        only_writer: no other process writes ``folder``, so that what killed ones left of it can be
            cleared away (``clear_unfinished``).
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if only_writer:
        clear_unfinished(folder)
    stage = folder.with_name(f".{folder.name}.{uuid4().hex}.part")
    stage.mkdir()
    try:
        with naming_file(folder):
            yield stage
        make_readable(stage)
        publish_folder(stage, folder)
    except BaseException:
        # The error under way is the one to hear of, not that of clearing up behind it.
        shutil.rmtree(stage, ignore_errors=True)
        raise


def clear_unfinished(folder: Path) -> None:
    """Remove what killed processes left beside ``folder`` when they replaced it.

    Between the two renames of ``publish_folder`` there is neither the older one nor the new one:
    the older one gets its name back.
    """
    name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{32}}\.part(?P<older>\.old)?")
    for path in sorted(folder.parent.iterdir()):
        match = name.fullmatch(path.name)
        if match is None:
            continue
        if match["older"] and not folder.exists():
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def export_folder_problem(folder: Path) -> str | None:
    """Say what ``folder`` holds that an export there would destroy; None: nothing."""
    if not folder.exists():
        return None
    if folder.is_dir() and ((folder / SPEC_FILE).is_file() or not any(folder.iterdir())):
        return None
    return (
        f"{folder} already holds something that is no export; it would be lost. Choose another "
        "folder or empty this one"
    )


def publish_folder(
    stage: Path, target: Path, *, aside: Path | None = None, files_are_synced: bool = False
) -> None:
    """Rename ``stage`` to ``target``; a folder of that name gives way.

    On the disk when this returns.

    Args:
        aside: name that the former ``target`` has until it is removed; a process that is killed
            between the two renames leaves it there.
        files_are_synced: whoever wrote the files has put their bytes on the disk, so that only
            their names are still to be.
    """
    if not files_are_synced:
        for path in stage.rglob("*"):
            if path.is_file():
                sync_file(path)
    sync_tree(stage)
    aside = aside or stage.with_name(f"{stage.name}.old")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    try:
        stage.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete ``folder`` under a dot name, so that nobody ever sees it half deleted."""
    doomed = folder.with_name(f"{DELETED_PREFIX}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def make_readable(folder: Path) -> None:
    """Let others read all below ``folder`` as far as the process's umask allows: safetensors and
    temporary folders are created for the owner alone."""
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def files_below(folder: Path) -> Iterator[str]:
    """Yield names of all files below ``folder``, relative to it, with forward slashes, sorted."""
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            yield path.relative_to(folder).as_posix()


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading: opening a pipe would wait for whoever writes to it.

    Raises:
        OSError: it cannot be opened, or is a pipe, a device or a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    # Asked of what was opened and not of its name, which may be another file's by then.
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is no regular file, but a folder, pipe or device", str(path))


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Put a file's bytes on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put the names in ``folder`` on the disk: a file that was synced can still lack its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """``sync_folder`` for ``folder`` and all below it, the deepest first."""
    for below, _, _ in os.walk(folder, topdown=False):
        sync_folder(Path(below))


def _umask() -> int:
    # It can only be read by setting it; the two calls are as short a time as there is.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
