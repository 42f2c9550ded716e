"""One run, from a checked file to its end."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from distill_checkpoint import claim_output_dir, release_output_dir
from distill_trainer import TrainResult

from distill_train.build import Run, build
from distill_train.schema import RunConfig

_log = logging.getLogger(__name__)


def run(config: RunConfig) -> TrainResult:
    """Claim the output folder, build everything, train.

    Raises:
        DistillError: whatever is wrong with folder, weights, data or training.
    """
    output_dir = Path(config.training.output_dir)
    started = time.perf_counter()
    if config.training.cpu_threads is not None:
        torch.set_num_threads(config.training.cpu_threads)
    claimed = claim_output_dir(output_dir, resume=config.checkpoint.resume != "none")
    try:
        parts = build(config, device=default_device())
    except BaseException:
        # Nothing has been trained yet: the next try must not find the folder taken.
        release_output_dir(claimed)
        raise
    _log.info("%s", _opening(config, parts))
    result = parts.trainer.run(parts.method, parts.loader)
    _log.info("%s", _closing(result, output_dir, time.perf_counter() - started))
    return result


def default_device() -> torch.device:
    """The accelerator that is there, or the CPU."""
    # Not `current_accelerator`: that takes a laptop's mps, on which float64 does not exist.
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _opening(config: RunConfig, parts: Run) -> str:
    roles = ", ".join(
        f"{name} ({'trained' if role.trainable else 'frozen'}, {role.precision})"
        for name, role in parts.bundle.roles.items()
    )
    return (
        f"{config.recipe.method} on {config.recipe.family}: {roles}\n"
        f"{config.training.max_train_steps:,} iterations of {config.training.global_batch_size} "
        f"samples on {default_device()}, seed {config.training.seed}\n"
        f"output: {config.training.output_dir}"
    )


def _closing(result: TrainResult, output_dir: Path, seconds: float) -> str:
    updates = ", ".join(f"{key} {count:,}" for key, count in result.updates.items())
    end = f"stopped ({result.stop_reason})" if result.stop_reason else "finished"
    return (
        f"{end} after iteration {result.iteration:,} in {seconds / 60:.1f} minutes; "
        f"updates: {updates}; everything is in {output_dir}"
    )
