"""Folders of these tests lie in memory, where there is some: a save waits for its disk some forty
times, and on a disk that others use too that is most of what these tests take. (A process that is
killed leaves the same files on both.)
"""

from __future__ import annotations

import multiprocessing.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")
NEEDED = 2 << 30


@pytest.fixture(scope="session")
def _memory(tmp_path_factory) -> Iterator[str | None]:
    # These stay on the disk: for who wants one, and as they live on after the tests here.
    tmp_path_factory.getbasetemp()
    multiprocessing.util.get_temp_dir()
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < NEEDED:
        yield None
        return
    with tempfile.TemporaryDirectory(dir=MEMORY, ignore_cleanup_errors=True) as name:
        yield name


@pytest.fixture(scope="module", autouse=True)
def _folders_in_memory(_memory: str | None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if _memory:
            patch.setattr(tempfile, "tempdir", _memory)
        yield


@pytest.fixture
def tmp_path(_folders_in_memory: None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
