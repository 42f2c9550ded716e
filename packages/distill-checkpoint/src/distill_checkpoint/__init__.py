"""Atomic saves, exact resume, weights out of checkpoints, export at the end of a run.

Names that need torch are imported on first use: the run file is checked before torch is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

from distill_checkpoint.config import (
    ChangesConfig,
    CheckpointConfig,
    ExportConfig,
    KeepBestConfig,
)
from distill_checkpoint.manifest import is_checkpoint
from distill_checkpoint.outputs import Claim, claim_output_dir

if TYPE_CHECKING:
    from distill_checkpoint.export import ExportCallback
    from distill_checkpoint.foreign.migration import MigrationFacts, migrate
    from distill_checkpoint.manager import CheckpointManager
    from distill_checkpoint.reading import StoredCheckpoint
    from distill_checkpoint.start_weights import read_start_weights
    from distill_checkpoint.writing import write_weights_checkpoint

_LAZY = {
    "CheckpointManager": "manager",
    "ExportCallback": "export",
    "MigrationFacts": "foreign.migration",
    "StoredCheckpoint": "reading",
    "migrate": "foreign.migration",
    "read_start_weights": "start_weights",
    "write_weights_checkpoint": "writing",
}

__all__ = [
    "ChangesConfig",
    "CheckpointConfig",
    "CheckpointManager",
    "Claim",
    "ExportCallback",
    "ExportConfig",
    "KeepBestConfig",
    "MigrationFacts",
    "StoredCheckpoint",
    "claim_output_dir",
    "is_checkpoint",
    "migrate",
    "read_start_weights",
    "write_weights_checkpoint",
]

__getattr__ = lazy_exports(__name__, _LAZY)
