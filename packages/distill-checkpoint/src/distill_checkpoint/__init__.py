"""Atomic saves, exact resume, export at the end of a run.

Names that need torch are imported on first use: the run file is checked before torch is.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from distill_checkpoint.config import CheckpointConfig, ExportConfig
from distill_checkpoint.outputs import claim_output_dir, release_output_dir

if TYPE_CHECKING:
    from distill_checkpoint.export import ExportCallback
    from distill_checkpoint.manager import CheckpointManager

_LAZY = {"CheckpointManager": "manager", "ExportCallback": "export"}

__all__ = [
    "CheckpointConfig",
    "CheckpointManager",
    "ExportCallback",
    "ExportConfig",
    "claim_output_dir",
    "release_output_dir",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f"distill_checkpoint.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
