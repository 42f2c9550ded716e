"""A run's output folder: which process may use it, and which checkpoints come and go in it.

No torch here: it is claimed before anything heavy is loaded.

A checkpoint is written under a name that begins with a dot and renamed once it is complete, so that
whatever is called ``checkpoint-<iteration>`` was intact when it got that name.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
import weakref
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from attrs import frozen
from distill_protocols import OutputError
from distill_runtime import (
    DELETED_PREFIX,
    UnreadableFileError,
    is_still_at,
    parse_json,
    publish_folder,
    remove_folder,
    try_lock,
)

from distill_checkpoint.config import KeepBestConfig
from distill_checkpoint.manifest import MANIFEST, is_checkpoint_folder

if TYPE_CHECKING:
    from distill_runtime import Ranks

MARKER = "run.json"
_MARKER_CHARACTERS = 1 << 16
"""More than a marker ever has."""

VISIBLE_AFTER = 60.0
"""Seconds that a network file system may take to show one host what another has just made."""

_STAGING = ".staging-"
"""Before the name of a checkpoint that is being written."""
_REPLACED = ".replaced-"
"""Before the name of a checkpoint that gives way to a new one of the same iteration."""
_NAME = re.compile(r"checkpoint-(\d{6,})")

logger = logging.getLogger(__name__)


# -- one run in it --------------------------------------------------------------------------------


@frozen(eq=False)
class Claim:
    """An output folder that is this process's until it is closed, released, or the process ends.

    A context manager: leaving it closes. The operating system holds the lock, so a process that
    is killed leaves none behind. Of several ranks the first one holds it; on the others this is a
    claim in name only.

    Attributes:
        folder: the absolute path.
    """

    folder: Path
    _file: IO[str] | None
    _made_marker: bool

    def mark_finished(self, iteration: int) -> None:
        """Note that the run is done with ``iteration``, exports and reports included
        (``finished_iteration``). The next claim takes the note away."""
        if self._file is not None:
            _write_marker(self._file, finished=iteration)

    def close(self) -> None:
        """Let another process go on in the folder. The marker stays: a run has been here."""
        if self._file is not None:
            self._file.close()

    def release(self) -> None:
        """Give the folder back for a run that did not start, and close.

        Takes the marker away if this claim made it, and the folder if nothing else is in it; a
        folder with checkpoints stays as it is.
        """
        is_ours = self._file is not None and not self._file.closed
        if is_ours and self._made_marker and not list_checkpoints(self.folder):
            (self.folder / MARKER).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: what is in it is not ours to delete
                self.folder.rmdir()
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def claim_output_dir(path: Path | str, *, resume: bool, ranks: Ranks | None = None) -> Claim:
    """Make ``path`` this run's output folder, or leave everything as it was.

    Args:
        resume: whether the run goes on from an earlier one, which may have its output here.
        ranks: all of them call this together: the first claims, for all of them. None: alone.

    Raises:
        OutputError: not a folder, not writable, of another run while ``resume`` is false, of
            a process that is running there now, or not one folder for all ranks. On all ranks.
    """
    folder = Path(os.path.abspath(path))
    if ranks is None or ranks.group is None:
        return _claim(folder, resume)
    claims: list[Claim] = []  # of rank 0 alone

    def claim_or_refuse() -> str | None:
        try:
            claims.append(_claim(folder, resume))
        except OutputError as error:
            return str(error)
        return None

    try:
        # The message travels, and not the error: raised on rank 0 alone it would be an error of
        # the ranks on all others, and an OutputError on none of them.
        refusal = ranks.run_on_first(claim_or_refuse)
        if refusal:
            raise OutputError(refusal)
        _refuse_unshared(folder, ranks)
    except BaseException:
        for claim in claims:
            claim.release()
        raise
    return claims[0] if claims else Claim(folder, None, False)


def _refuse_unshared(folder: Path, ranks: Ranks) -> None:
    """Refuse a folder in which not every rank sees the marker that rank 0 has just made."""
    sees_marker = ranks.gather_results(lambda: _appears(folder / MARKER))
    if not all(sees_marker):
        missing = ", ".join(str(rank) for rank, sees in enumerate(sees_marker) if not sees)
        raise OutputError(
            f"{folder} on rank 0 is not the {folder} of rank {missing}, where its {MARKER} has not "
            f"come up within {VISIBLE_AFTER:g} s; all ranks write their parts of a checkpoint into "
            "one folder, or none would be complete. Choose an output folder on storage that all "
            "hosts share."
        )


def _appears(marker: Path) -> bool:
    """Wait until ``marker`` is there; False if it does not come up in time."""
    deadline = time.monotonic() + VISIBLE_AFTER
    while not marker.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _claim(folder: Path, resume: bool) -> Claim:
    with _as_output_error(folder), _removed_on_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"is there space and permission?")
        # A marker that is locked comes first: "resume" is no advice while the run is alive.
        if not resume and list_checkpoints(folder) and not (folder / MARKER).exists():
            raise _taken(folder, next(iter(list_checkpoints(folder).values())).name)
        return _mark(folder, resume)


def _mark(folder: Path, resume: bool) -> Claim:
    marker = folder / MARKER
    try:
        # "x": of two runs that start at once in one folder, one makes it.
        file, is_new = marker.open("x+", encoding="utf-8"), True
    except FileExistsError:
        file, is_new = marker.open("r+", encoding="utf-8"), False
    try:
        _lock(file, folder)
        _refuse_unlinked(file, folder)
        if not is_new and not resume:
            raise _taken(folder, MARKER)
        _write_marker(file)
    except BaseException as error:
        # A marker that another process has locked by now is that process's.
        if is_new and not isinstance(error, OutputError):
            marker.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk raises again on closing
            file.close()
        raise
    claim = Claim(folder, file, is_new)
    # A claim that nobody closed ends with the last reference to it.
    weakref.finalize(claim, file.close)
    return claim


def _lock(file: IO[str], folder: Path) -> None:
    locked = try_lock(file)
    if locked is False:
        raise OutputError(
            f"{folder}: another process is running there ({_holder(file)}); two runs in one "
            "folder would overwrite each other's logs and checkpoints. Wait for it or stop it, "
            "or choose another output folder."
        )
    if locked is None:  # a run there is no worse off than without them
        logger.warning("%s has no file locks: start no second run there", folder)


def _refuse_unlinked(file: IO[str], folder: Path) -> None:
    """Another process may have released the folder between our opening and our locking."""
    if not is_still_at(file, folder / MARKER):
        raise OutputError(
            f"{folder}: another process gave it up this very moment, so that this claim would be "
            "of a file that is gone. Start again."
        )


def _holder(file: IO[str]) -> str:
    record = _read_marker(file)
    if "pid" not in record or "host" not in record:
        return "pid unknown"  # it has not written it yet
    return f"pid {record['pid']} on {record['host']}"


def _read_marker(file: IO[str]) -> dict[str, object]:
    """Read the marker; empty where it is new or was torn by a full disk."""
    try:
        value = parse_json(file.read(_MARKER_CHARACTERS), MARKER)
    except (UnreadableFileError, UnicodeDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def finished_iteration(folder: Path) -> int | None:
    """Return the last iteration of the run in ``folder``; None: it is not done, or there is none.

    Nothing is written, and no lock is asked for.
    """
    try:
        with (folder / MARKER).open(encoding="utf-8") as file:
            finished = _read_marker(file).get("finished")
    except OSError:
        return None
    return finished if isinstance(finished, int) else None


def _write_marker(file: IO[str], *, finished: int | None = None) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    file.seek(0)
    record = {"format": "distill-run", "version": 1, "started": now} | _read_marker(file)
    record |= {"pid": os.getpid(), "host": socket.gethostname()}
    record.pop("finished", None)
    if finished is not None:
        record["finished"] = finished
    file.seek(0)
    json.dump(record, file)
    file.truncate()
    file.flush()


def _taken(folder: Path, evidence: str) -> OutputError:
    has_checkpoints = bool(list_checkpoints(folder))
    state = "" if has_checkpoints else ", which has left no checkpoint"
    afresh = "" if has_checkpoints else ", and starts afresh in the same folder"
    return OutputError(
        f"{folder} already holds another run ({evidence}){state}; two runs in one folder would "
        f"overwrite each other's logs and checkpoints. Go on with it (resume: latest{afresh}), or "
        "choose another folder, or move that one away."
    )


@contextlib.contextmanager
def _as_output_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be used as output folder: {error.strerror or error}. A run keeps "
            "checkpoints and logs there, so it must be a folder with write permission and "
            "free space; mend that, or choose another folder."
        ) from error


@contextlib.contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    """Remove the folders that the block makes, if it raises."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # not made, or another run is in it by now
                parent.rmdir()
        raise


# -- checkpoints in it ----------------------------------------------------------------------------


def folder_name(iteration: int) -> str:
    """``checkpoint-000400``."""
    return f"checkpoint-{iteration:06d}"


def list_checkpoints(output_dir: Path) -> dict[int, Path]:
    """List the folders with a checkpoint's name, intact or not, by iteration, the newest first."""
    if not output_dir.is_dir():
        return {}
    folders = {
        int(match[1]): path
        for path in output_dir.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(folders.items(), reverse=True))


def find_newest_checkpoint(output_dir: Path) -> Path | None:
    """Find the newest checkpoint in a run's output folder, intact or damaged."""
    return next(
        (path for path in list_checkpoints(output_dir).values() if is_checkpoint_folder(path)), None
    )


def hold_checkpoint(folder: Path) -> IO[bytes] | None:
    """Keep the run of the checkpoint ``folder`` from deleting it until the result is closed.

    None: it is gone, is being deleted, or has something else than a file for a manifest.
    """
    if not (folder / MANIFEST).is_file():  # opening a pipe would wait for ever
        return None
    try:
        file = (folder / MANIFEST).open("rb")
    except FileNotFoundError:
        return None
    if try_lock(file, shared=True) is False or not is_still_at(file, folder / MANIFEST):
        file.close()
        return None
    return file


def delete_checkpoint(folder: Path) -> bool:
    """Delete a checkpoint, unless somebody reads it (``hold_checkpoint``); whether it was deleted.

    Raises:
        OSError: it cannot be deleted.
    """
    with (folder / MANIFEST).open("r+b") as file:
        if try_lock(file) is False:
            return False
        remove_folder(folder)
    return True


def new_staging_folder(target: Path) -> Path:
    """Make an empty folder beside ``target``, to be filled and then published."""
    staging = target.with_name(f"{_STAGING}{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    return staging


def publish(staging: Path, target: Path) -> None:
    """Rename ``staging``, whose files are on the disk, to ``target``.

    A folder of that name (damaged, or of a run that was resumed from before it) gives way. When
    this returns, the new name is on the disk.
    """
    aside = target.with_name(f"{_REPLACED}{target.name}")
    publish_folder(staging, target, aside=aside, files_are_synced=True)


def clear_leftovers(output_dir: Path) -> None:
    """Remove what a killed process left under dot names."""
    if not output_dir.is_dir():
        return
    for path in sorted(output_dir.iterdir()):
        if path.name.startswith(_REPLACED):
            # Killed between the two renames of `publish`: the old one is still the newest.
            target = path.with_name(path.name.removeprefix(_REPLACED))
            if not target.exists():
                path.rename(target)
                continue
        if path.name.startswith((_STAGING, _REPLACED, DELETED_PREFIX)):
            logger.info("removed %s, left by a process that was killed", path)
            shutil.rmtree(path, ignore_errors=True)


def find_superseded(
    metrics: Mapping[int, Mapping[str, float]],
    *,
    keep_last: int,
    keep_every: int | None = None,
    keep_best: KeepBestConfig | None = None,
    kept_until: Collection[int] = (),
) -> tuple[int, ...]:
    """Choose which of the intact checkpoints to delete, the oldest first.

    The newest ``keep_last`` (at least 1) stay, multiples of ``keep_every``, those that were
    best by a metric (of equals the newer), and those that somebody asked for.

    Args:
        metrics: by iteration, what was measured in it.
        kept_until: iterations until each of which the newest checkpoint stays
            (``RunState.keep_checkpoint``).
    """
    best: set[int] = set()
    if keep_best is not None:
        sign = 1 if keep_best.mode == "min" else -1
        measured = {i: m[keep_best.metric] for i, m in metrics.items() if keep_best.metric in m}
        best.update(sorted(measured, key=lambda i: (sign * measured[i], -i))[: keep_best.count])
    asked = {max((i for i in metrics if i <= until), default=0) for until in kept_until}
    older = sorted(metrics)[:-keep_last]
    return tuple(
        i
        for i in older
        if (keep_every is None or i % keep_every) and i not in best and i not in asked
    )
