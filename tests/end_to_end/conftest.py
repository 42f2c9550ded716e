"""The shipped tiny run files, shortened."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs" / "tiny"


def _absolute(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _absolute(item) for key, item in value.items()}
    if isinstance(value, str) and value.startswith("./"):
        return str((TINY / value).resolve())
    return value


def _laid_over(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _laid_over(base[key], value)
        elif value is None:
            base.pop(key, None)
        else:
            base[key] = value
    return base


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Path]:
    """``tiny("dmd2", training={...})`` writes that run file with changes; None drops a key."""

    def make(name: str, file: str = "run.yaml", **changes: Any) -> Path:
        from distill_train.source import read_source  # YAML 1.2 scalars, as the app reads them

        values = _absolute(read_source(TINY / f"{name}.yaml").values)
        values["training"] |= {"output_dir": str(tmp_path / "out"), "global_batch_size": 4}
        path = tmp_path / file
        path.write_text(yaml.safe_dump(_laid_over(values, changes), sort_keys=False))
        return path

    return make


def app(*args: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The app as a process of its own."""
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
