"""A folder appears whole or not at all: staged under a dot name, then renamed."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from distill_checkpoint.files import sync_folder, sync_tree
from distill_checkpoint.layout import DELETED, REPLACED, STAGING

logger = logging.getLogger(__name__)


def new_staging(target: Path) -> Path:
    """An empty folder beside ``target``, to be filled and then published."""
    staging = target.with_name(f"{STAGING}{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    return staging


def publish(staging: Path, target: Path) -> None:
    """Rename; a folder of that name (damaged, or of a run resumed from before it) gives way.

    On the disk when this returns, if the files in ``staging`` were.
    """
    sync_tree(staging)
    aside = target.with_name(f"{REPLACED}{target.name}")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    sync_folder(target.parent)
    if aside.exists():
        shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(output_dir: Path) -> None:
    """Remove what a killed process left under dot names."""
    if not output_dir.is_dir():
        return
    for path in sorted(output_dir.iterdir()):
        if path.name.startswith(REPLACED):
            # Killed between the two renames of a commit: the old one is still the newest.
            target = path.with_name(path.name.removeprefix(REPLACED))
            if not target.exists():
                path.rename(target)
                continue
        if path.name.startswith((STAGING, DELETED, REPLACED)):
            logger.info("removed %s, left by a process that was killed", path)
            shutil.rmtree(path, ignore_errors=True)
