"""One output folder, one run. No torch here: it is claimed before anything heavy is loaded."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from distill_protocols import OutputError

from distill_checkpoint.layout import checkpoints

MARKER = "run.json"


def claim_output_dir(path: Path | str, *, resume: bool) -> Path:
    """Make ``path`` this run's output folder, or leave everything as it was.

    Args:
        resume: whether the run goes on from an earlier one, which may have its output here.

    Returns:
        The absolute path.

    Raises:
        OutputError: not a folder, not writable, or of another run while ``resume`` is false.
    """
    folder = Path(os.path.abspath(path))
    with _as_output_error(folder), _removed_on_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"is there room and permission?")
        if not resume and checkpoints(folder):
            raise _taken(folder, next(iter(checkpoints(folder).values())).name)
        _mark(folder, resume)
    return folder


def release_output_dir(path: Path | str) -> None:
    """Give back a folder that was claimed for a run which then did not start.

    Takes the marker away, and the folder if nothing else is in it; a folder with checkpoints
    stays as it is.
    """
    folder = Path(path)
    if not checkpoints(folder):
        (folder / MARKER).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: what is in it is not ours to delete
            folder.rmdir()


def _mark(folder: Path, resume: bool) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    marker = folder / MARKER
    try:
        # "x": of two runs that start at once in one folder, one gets it.
        file = marker.open("x", encoding="utf-8")
    except FileExistsError:
        if not resume:
            raise _taken(folder, MARKER) from None
        return
    try:
        with file:
            json.dump({"format": "distill-run", "version": 1, "started": now}, file)
    except OSError:
        marker.unlink(missing_ok=True)
        raise


def _taken(folder: Path, evidence: str) -> OutputError:
    return OutputError(
        f"{folder} already holds another run ({evidence}); two runs in one folder would overwrite "
        "each other's logs and checkpoints. Go on with it (checkpoint.resume: latest), or choose "
        "another output_dir, or move that folder away."
    )


@contextlib.contextmanager
def _as_output_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be used as output folder: {error.strerror or error}. A run keeps "
            "checkpoints and logs there, so it must be a folder with write permission and room; "
            "mend that, or choose another output_dir."
        ) from error


@contextlib.contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """Take back the folders that the block made, if it raises."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in made:
            with contextlib.suppress(OSError):  # not made, or another run is in it by now
                parent.rmdir()
        raise
