"""A folder that is written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_protocols import OutputError


@contextmanager
def whole_or_nothing(folder: Path, mark: str) -> Iterator[Path]:
    """A staging folder beside ``folder``, which takes its place when the block ends well.

    An older export (a folder with a file ``mark``) is replaced; anything else is left alone.

    Raises:
        OutputError: ``folder`` holds something else, or cannot be written.
    """
    if folder.exists() and not _may_be_replaced(folder, mark):
        raise OutputError(
            f"{folder} already holds something that is no export; it would be lost. Choose another "
            "folder or empty this one"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written ({error.strerror}); choose a folder where this user may "
            "write"
        ) from error
    try:
        yield stage
        _settle(stage)
        _replace(folder, stage)
    except BaseException as error:
        shutil.rmtree(stage, ignore_errors=True)
        if isinstance(error, OSError):
            raise OutputError(f"{folder} could not be written: {error}. Free space?") from error
        raise


def _may_be_replaced(folder: Path, mark: str) -> bool:
    return folder.is_dir() and ((folder / mark).is_file() or not any(folder.iterdir()))


def _replace(folder: Path, stage: Path) -> None:
    if not folder.exists():
        stage.rename(folder)
    else:
        old = stage.with_name(f"{stage.name}.old")
        folder.rename(old)
        try:
            stage.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        shutil.rmtree(old)
    _sync(folder.parent)  # or the new name may be gone after a power cut


def _settle(stage: Path) -> None:
    """Flush files to disk before the rename, and let others read them (mkdtemp and safetensors
    create for the owner alone)."""
    stage.chmod(0o755)
    for path in stage.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        _sync(path)
    _sync(stage)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
