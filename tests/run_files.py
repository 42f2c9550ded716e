"""Fixtures: a right run file on the shipped tiny Wan, for tests to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny"


def tiny_run(output_dir: Path) -> dict[str, Any]:
    """dmd2.yaml with absolute paths, few steps and no report."""
    values = yaml.safe_load((TINY / "dmd2.yaml").read_text())
    for role in values["models"].values():
        role["path"] = str(TINY / "wan")
    values["data"]["path"] = str(TINY / "data")
    values["training"] |= {"output_dir": str(output_dir), "max_train_steps": 6}
    values["training"]["global_batch_size"] = 4
    # PyYAML's 1.1 rules read 6.0e-4 as a string.
    values["training"]["optimizer"]["lr"] = 3e-4
    values["models"]["critic"]["optimizer"]["lr"] = 6e-4
    del values["callbacks"]["report"], values["validation"]
    return values


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    return tiny_run(tmp_path / "out")


@pytest.fixture
def write(tmp_path: Path):
    """Write values (or text) as a run file."""

    def write_run(content: dict[str, Any] | str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(
            content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
        )
        return path

    return write_run
