"""Files that a process locks: the operating system gives a lock up when its process ends.

No torch here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import weakref
from pathlib import Path
from typing import IO, Self

from attrs import frozen
from distill_protocols import OutputError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def try_lock(file: IO[str] | IO[bytes], *, shared: bool = False) -> bool | None:
    """Lock ``file`` until it is closed.

    Args:
        shared: beside others that lock it so.

    Returns:
        False: another process holds it. None: its file system has no locks, as some network ones.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def is_still_at(file: IO[str] | IO[bytes], path: Path) -> bool:
    """Tell whether ``file`` is what is at ``path`` now: it may have been deleted between opening
    and locking."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@frozen(eq=False)
class FolderClaim:
    """What this process alone writes, until it is closed or the process ends.

    A context manager: leaving it closes.
    """

    _path: Path
    _file: IO[str]

    def close(self) -> None:
        """Let others write."""
        if not self._file.closed:
            # First, while it is locked: who opens it later than this makes a new one.
            with contextlib.suppress(OSError):
                self._path.unlink()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def claim_folder(folder: Path, name: str) -> FolderClaim:
    """Be the only one that writes ``name`` in ``folder``, which is made; by ``.<name>.lock``.

    Raises:
        OutputError: another process is writing it.
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.lock"
    while True:
        file = path.open("a+", encoding="utf-8")
        locked = try_lock(file)
        if locked is False:
            file.seek(0)
            holder = file.read(200).strip() or "pid unknown"
            file.close()
            raise OutputError(
                f"{folder}: another process is writing there ({holder}); of what two write into "
                "one folder one part would be lost. Wait for it or stop it, or name another folder."
            )
        if is_still_at(file, path):
            break
        file.close()  # its holder has closed it since, and deleted it
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}")
    file.flush()
    claim = FolderClaim(path, file)
    weakref.finalize(claim, file.close)
    return claim
