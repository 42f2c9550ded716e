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
from distill_trainer import Distribution, TrainResult, check_same_run

from distill_train.build import Run, build
from distill_train.schema import RunConfig

_log = logging.getLogger(__name__)


def run(config: RunConfig) -> TrainResult:
    """Claim the output folder, build everything, train; on every rank that torchrun started.

    Raises:
        DistillError: whatever is wrong with folder, weights, data, training, or other ranks.
    """
    started = time.perf_counter()
    if config.training.cpu_threads is not None:
        torch.set_num_threads(config.training.cpu_threads)
    output_dir = Path(config.training.output_dir)
    resume = config.checkpoint.resume != "none"
    with (
        _sigterm_interrupts(),
        Distribution.start(config.training.distributed, device_type()) as distribution,
    ):
        # Before the folder is claimed, which may be another one on each rank.
        check_same_run(distribution.ranks, config.resolved)
        with claim_output_dir(output_dir, resume=resume, ranks=distribution.ranks) as claim:
            parts: Run | None = None
            try:
                parts = build(config, distribution=distribution)
                _log.info("%s", _opening(config, parts, distribution))
                result = parts.trainer.run(parts.method, parts.loader)
                # torchrun ends all as soon as one ends with a status: the first may still be busy
                # with its trackers.
                distribution.ranks.barrier()
            finally:
                if parts is None or not any(parts.method.update_counts.values()):
                    # Nothing was trained (an error, or a stop in the first iteration): the next
                    # try must not find the folder taken.
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


def device_type() -> str:
    """The accelerator that is there, or the CPU."""
    # Not `current_accelerator`: that takes a laptop's mps, on which float64 does not exist.
    return "cuda" if torch.cuda.is_available() else "cpu"


def _opening(config: RunConfig, parts: Run, distribution: Distribution) -> str:
    roles = ", ".join(
        f"{name} ({'trained' if role.trainable else 'frozen'}, {role.precision})"
        for name, role in parts.bundle.roles.items()
    )
    size = distribution.ranks.size
    devices = distribution.device.type
    if size > 1:
        training = config.training
        devices = (
            f"{size} processes ({devices}, {distribution.strategy}): {training.micro_batch(size)} "
            f"each in {training.accumulation(size)} micro step(s)"
        )
    return (
        f"{config.recipe.method} on {config.recipe.family}: {roles}\n"
        f"{config.training.max_train_steps:,} iterations of {config.training.global_batch_size} "
        f"samples on {devices}, seed {config.training.seed}\n"
        f"output: {config.training.output_dir}"
    )


def _closing(result: TrainResult, output_dir: Path, seconds: float) -> str:
    updates = ", ".join(f"{key} {count:,}" for key, count in result.updates.items())
    end = f"stopped ({result.stop_reason})" if result.stop_reason else "finished"
    return (
        f"{end} after iteration {result.iteration:,} in {seconds / 60:.1f} minutes; "
        f"updates: {updates}; everything is in {output_dir}"
    )
