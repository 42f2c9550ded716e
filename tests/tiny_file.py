"""The shipped tiny run files, changed. No import of torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from distill_runfile.source import read_source  # YAML 1.2 scalars, as the app reads them

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny"


def tiny_values(name: str) -> dict[str, Any]:
    """Read ``configs/tiny/<name>.yaml`` with absolute paths, and no start from a run that
    would have to come first."""
    values = _absolute(read_source(TINY / f"{name}.yaml").values)
    for role in values["models"].values():
        role.pop("init_from", None)
    return values


def write_changed(path: Path, values: dict[str, Any], changes: Mapping[str, Any]) -> Path:
    """Write ``values`` with ``changes`` to a file; a change to None drops its key."""
    path.write_text(yaml.safe_dump(_laid_over(values, changes), sort_keys=False))
    return path


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
