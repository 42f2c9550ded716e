"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it into place if the block succeeds, remove it if
    it fails.

    Beside, because a rename is atomic only within one file system; with the same suffix, because
    writers choose their format by it. The parent folder is made. Errors of the block pass through
    unchanged.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.with_name(f".{final.stem}.{os.getpid()}.tmp{final.suffix}")
    try:
        yield staging
        staging.replace(final)
    finally:
        staging.unlink(missing_ok=True)
