"""Files that a process locks: the operating system gives a lock up when its process ends.

No torch here.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO, Any

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def try_lock(file: IO[Any], *, shared: bool = False) -> bool | None:
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


def is_still_at(file: IO[Any], path: Path) -> bool:
    """Tell whether ``file`` is what is at ``path`` now: it may have been deleted between opening
    and locking."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
