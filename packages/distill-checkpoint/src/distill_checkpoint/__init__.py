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
from distill_checkpoint.manifest import is_checkpoint_folder, role_problems
from distill_checkpoint.output_folder import (
    Claim,
    claim_output_dir,
    find_newest_checkpoint,
    finished_iteration,
    hold_checkpoint,
    list_checkpoints,
)

if TYPE_CHECKING:
    from distill_checkpoint.export import ExportCallback, gather_on_rank0
    from distill_checkpoint.foreign import MigrationReport, migrate
    from distill_checkpoint.manager import CheckpointManager
    from distill_checkpoint.tensors import new_checkpoint_group
    from distill_checkpoint.weights import (
        StoredCheckpoint,
        read_start_weights,
        write_weights_checkpoint,
    )

_LAZY = {
    "CheckpointManager": "manager",
    "ExportCallback": "export",
    "MigrationReport": "foreign",
    "StoredCheckpoint": "weights",
    "gather_on_rank0": "export",
    "migrate": "foreign",
    "new_checkpoint_group": "tensors",
    "read_start_weights": "weights",
    "write_weights_checkpoint": "weights",
}

__all__ = [
    "ChangesConfig",
    "CheckpointConfig",
    "CheckpointManager",
    "Claim",
    "ExportCallback",
    "ExportConfig",
    "KeepBestConfig",
    "MigrationReport",
    "StoredCheckpoint",
    "claim_output_dir",
    "find_newest_checkpoint",
    "finished_iteration",
    "gather_on_rank0",
    "hold_checkpoint",
    "is_checkpoint_folder",
    "list_checkpoints",
    "migrate",
    "new_checkpoint_group",
    "read_start_weights",
    "role_problems",
    "write_weights_checkpoint",
]

__getattr__ = lazy_exports(__name__, _LAZY)
