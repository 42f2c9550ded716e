"""One output folder, one run. No torch here: it is claimed before anything heavy is loaded."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from attrs import frozen
from distill_protocols import OutputError

from distill_checkpoint.layout import checkpoints

if TYPE_CHECKING:
    from distill_runtime import Ranks

MARKER = "run.json"

VISIBLE_AFTER = 60.0
"""Seconds that a network file system may take to show one host what another has just made."""

logger = logging.getLogger(__name__)


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

    def close(self) -> None:
        """Let another process go on in the folder. The marker stays: a run has been here."""
        if self._file is not None:
            self._file.close()

    def release(self) -> None:
        """Give the folder back for a run that did not start, and close.

        Takes the marker away if this claim made it, and the folder if nothing else is in it; a
        folder with checkpoints stays as it is.
        """
        held = self._file is not None and not self._file.closed
        if held and self._made_marker and not checkpoints(self.folder):
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
    held: list[Claim] = []
    try:
        refusal = ranks.run_on_first(lambda: _refusal(folder, resume, held))
        if refusal:
            raise OutputError(refusal)
        _refuse_unseen(folder, ranks)
    except BaseException:
        for claim in held:
            claim.release()
        raise
    return held[0] if held else Claim(folder, None, False)


def _refusal(folder: Path, resume: bool, held: list[Claim]) -> str | None:
    """Why the claim, which is added to ``held``, cannot be had."""
    try:
        held.append(_claim(folder, resume))
    except OutputError as error:
        return str(error)
    return None


def _refuse_unseen(folder: Path, ranks: Ranks) -> None:
    seen = ranks.gather_results(lambda: _seen(folder / MARKER))
    if not all(seen):
        missing = ", ".join(str(rank) for rank, there in enumerate(seen) if not there)
        raise OutputError(
            f"{folder} on rank 0 is not the {folder} of rank {missing}, where its {MARKER} has not "
            f"come up within {VISIBLE_AFTER:g} s; all ranks write their parts of a checkpoint into "
            "one folder, or no checkpoint would be whole. Choose an output_dir on storage that all "
            "hosts share."
        )


def _seen(marker: Path) -> bool:
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
            probe.write(b"is there room and permission?")
        # A marker that is held comes first: "resume" is no advice while the run is alive.
        if not resume and checkpoints(folder) and not (folder / MARKER).exists():
            raise _taken(folder, next(iter(checkpoints(folder).values())).name)
        return _mark(folder, resume)


def _mark(folder: Path, resume: bool) -> Claim:
    file, made = _open_marker(folder / MARKER)
    try:
        _lock(file, folder)
        _refuse_unlinked(file, folder)
        if not made and not resume:
            raise _taken(folder, MARKER)
        _write_marker(file)
    except BaseException as error:
        # A marker that another process holds by now is that process's.
        if made and not isinstance(error, OutputError):
            (folder / MARKER).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk is heard of again on closing
            file.close()
        raise
    claim = Claim(folder, file, made)
    # A claim that nobody closed ends with the run that held it.
    weakref.finalize(claim, file.close)
    return claim


def _open_marker(marker: Path) -> tuple[IO[str], bool]:
    """The marker, and whether it was made now."""
    try:
        # "x": of two runs that start at once in one folder, one makes it.
        return marker.open("x+", encoding="utf-8"), True
    except FileExistsError:
        return marker.open("r+", encoding="utf-8"), False


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            f"{folder}: another process is running there ({_holder(file)}); two runs in one "
            "folder would overwrite each other's logs and checkpoints. Wait for it or stop it, "
            "or choose another output_dir."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
        # Some network file systems have no locks; a run there is no worse off than without them.
        logger.warning("%s has no file locks: start no second run there (%s)", folder, error)


def _refuse_unlinked(file: IO[str], folder: Path) -> None:
    """Another process may have released the folder between our opening and our locking."""
    try:
        ours = os.path.samestat(os.fstat(file.fileno()), (folder / MARKER).stat())
    except FileNotFoundError:
        ours = False
    if not ours:
        raise OutputError(
            f"{folder}: another process gave it up this very moment, so that this claim would be "
            "of a file that is gone. Start again."
        )


def _holder(file: IO[str]) -> str:
    try:
        facts = json.load(file)
        return f"pid {facts['pid']} on {facts['host']}"
    except (ValueError, LookupError, TypeError):
        return "pid unknown"  # it has not written it yet


def _write_marker(file: IO[str]) -> None:
    try:
        facts = json.load(file)
    except ValueError:  # new, or torn by a full disk
        facts = {}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts = {"format": "distill-run", "version": 1, "started": now} | facts
    facts |= {"pid": os.getpid(), "host": socket.gethostname()}
    file.seek(0)
    json.dump(facts, file)
    file.truncate()
    file.flush()


def _taken(folder: Path, evidence: str) -> OutputError:
    begun = "" if checkpoints(folder) else ", which has left no checkpoint"
    afresh = "" if checkpoints(folder) else ", and starts afresh in the same folder"
    return OutputError(
        f"{folder} already holds another run ({evidence}){begun}; two runs in one folder would "
        "overwrite each other's logs and checkpoints. Go on with it (checkpoint.resume: latest"
        f"{afresh}), or choose another output_dir, or move that folder away."
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
