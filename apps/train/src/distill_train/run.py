"""One run, from a checked file to its end."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from distill_checkpoint import claim_output_dir
from distill_trainer import TrainResult

from distill_train.build import Run, build
from distill_train.schema import RunConfig

_log = logging.getLogger(__name__)


def run(config: RunConfig) -> TrainResult:
    """Claim the output folder, build everything, train.

    Raises:
        DistillError: whatever is wrong with folder, weights, data or training.
    """
    started = time.perf_counter()
    if config.training.cpu_threads is not None:
        torch.set_num_threads(config.training.cpu_threads)
    output_dir = Path(config.training.output_dir)
    resume = config.checkpoint.resume != "none"
    with _sigterm_interrupts(), claim_output_dir(output_dir, resume=resume) as claim:
        parts: Run | None = None
        try:
            parts = build(config, device=default_device())
            _log.info("%s", _opening(config, parts))
            result = parts.trainer.run(parts.method, parts.loader)
        finally:
            if parts is None or not any(parts.method.update_counts.values()):
                # Nothing was trained (an error, or a stop in the first iteration): the next try
                # must not find the folder taken.
                claim.release()
    _log.info("%s", _closing(result, output_dir, time.perf_counter() - started))
    return result


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """While weights are read, SIGTERM unwinds like Ctrl-C; the trainer then has its own way."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


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
