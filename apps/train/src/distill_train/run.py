"""One run, from a checked file to its end."""

from __future__ import annotations

from pathlib import Path

import torch
from distill_checkpoint import claim_output_dir
from distill_trainer import TrainResult

from distill_train.build import build
from distill_train.schema import RunConfig


def run(config: RunConfig) -> TrainResult:
    """Claim the output folder, build everything, train.

    Raises:
        DistillError: whatever is wrong with folder, weights, data or training.
    """
    output_dir = Path(config.training.output_dir)
    claim_output_dir(output_dir, resume=config.checkpoint.resume != "none")
    parts = build(config, device=default_device())
    return parts.trainer.run(parts.method, parts.loader)


def default_device() -> torch.device:
    """The accelerator that is there, or the CPU."""
    # `current_accelerator` would take a laptop's mps, on which float64 does not exist.
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
