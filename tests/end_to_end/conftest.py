"""The shipped tiny run files, shortened."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_file import tiny_values, write_changed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """Return ``tiny("dmd2", training={...})``, which writes that run file; None drops a key."""

    return partial(write_tiny, tmp_path)


@pytest.fixture(scope="session", name="write_tiny")
def _write_tiny() -> Callable[..., Path]:
    return write_tiny


def write_tiny(folder: Path, name: str, file: str = "run.yaml", **changes: Any) -> Path:
    """Write a shipped run file with four clips a batch, whose output is ``folder/out``."""
    values = tiny_values(name)
    values["training"] |= {"output_dir": str(folder / "out"), "global_batch_size": 4}
    return write_changed(folder / file, values, changes)


def app(*args: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run the app in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "apps" / "train"), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        **kwargs,
    )


@pytest.fixture(name="app")
def _app() -> Callable[..., subprocess.CompletedProcess[str]]:
    return app
