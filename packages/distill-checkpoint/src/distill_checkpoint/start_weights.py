"""Weights that a role starts with: of a checkpoint, or of a model's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_protocols import FamilyPlugin, RoleSpec, WeightSource

from distill_checkpoint.manifest import is_checkpoint
from distill_checkpoint.weights import StoredCheckpoint


def read_start_weights(
    path: str, role: str, *, ema: bool, family: FamilyPlugin[Any], spec: RoleSpec
) -> Mapping[str, WeightSource]:
    """Open the weights in ``path``, by module.

    Args:
        path: a checkpoint's folder, or whatever the family reads (``start_weights``).
            Folders are absolute, so that no folder is taken for a hub id.
        role: which role of a checkpoint.
        ema: a checkpoint's averaged weights instead of its live ones.

        spec: the role that starts with them.

    Raises:
        DistillError: there are none, or they are damaged.
    """
    folder = Path(path)
    if folder.is_absolute() and is_checkpoint(folder):
        return StoredCheckpoint.open(folder).weights(role, ema=ema)
    return family.start_weights(spec, path)
