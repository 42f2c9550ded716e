"""Atomic saves, exact resume, export at the end of a run.

Names that need torch are imported on first use: the run file is checked before torch is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_checkpoint.config import CheckpointConfig, ExportConfig
from distill_checkpoint.outputs import Claim, claim_output_dir

if TYPE_CHECKING:
    from distill_checkpoint.export import ExportCallback
    from distill_checkpoint.manager import CheckpointManager

_LAZY = {"CheckpointManager": "manager", "ExportCallback": "export"}

__all__ = [
    "CheckpointConfig",
    "CheckpointManager",
    "Claim",
    "ExportCallback",
    "ExportConfig",
    "claim_output_dir",
]

__getattr__ = lazy_exports(__name__, _LAZY)
