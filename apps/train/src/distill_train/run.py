"""One run, from a checked file to its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from pathlib import Path

import torch
from distill_checkpoint import claim_output_dir, find_newest_checkpoint, list_checkpoints
from distill_protocols import OutputError
from distill_runfile import RunConfig, export_warnings
from distill_runtime import device_type, sigterm_as_interrupt
from distill_trainer import Distribution, TrainResult, check_same_run

from distill_train.build import Run, build

_log = logging.getLogger(__name__)


def run(config: RunConfig, *, again: Collection[str] = ()) -> TrainResult:
    """Claim the output folder, build everything, train; on every rank that torchrun started.

    Args:
        again: names of callbacks ("export" and "validation" among them) whose results at the end
            are made anew: the run is complete, and does nothing else.

    Raises:
        DistillError: whatever is wrong with folder, weights, data, training, or other ranks.
    """
    started = time.perf_counter()
    if config.training.cpu_threads is not None:
        torch.set_num_threads(config.training.cpu_threads)
    output_dir = Path(config.training.output_dir)
    resume = config.checkpoint.resume != "none"
    with (
        # While weights are read; the trainer then finishes its iteration and saves.
        sigterm_as_interrupt(),
        Distribution.start(config.training.distributed, device_type()) as distribution,
    ):
        # Before the folder is claimed, which may be another one on each rank.
        check_same_run(distribution.ranks, config.resolved)
        if again:
            distribution.ranks.run_each(lambda: _refuse_unfinished(config, output_dir))
        with claim_output_dir(output_dir, resume=resume, ranks=distribution.ranks) as claim:
            parts: Run | None = None
            try:
                parts = build(config, distribution=distribution, again=again)
                _log.info("%s", _opening(config, parts, distribution))
                for warning in export_warnings(config):
                    _log.warning("%s", warning)
                for note in config.notes:
                    _log.info("%s", note)
                result = parts.trainer.run(parts.method, parts.loader)
                # torchrun ends all as soon as one ends with a status: the first may still be busy
                # with its trackers.
                distribution.ranks.barrier()
                if result.stop_reason is None:
                    claim.mark_finished(result.iteration)
            finally:
                if again:
                    claim.mark_finished(config.training.max_train_steps)
                if parts is None or not any(parts.method.update_counts.values()):
                    # Nothing was trained (an error, or a stop in the first iteration): the next
                    # try must not find the folder taken.
                    claim.release()
    _log.info("%s", _closing(result, output_dir, time.perf_counter() - started))
    return result


def _refuse_unfinished(config: RunConfig, output_dir: Path) -> None:
    steps, newest = config.training.max_train_steps, find_newest_checkpoint(output_dir)
    if newest is None or newest != list_checkpoints(output_dir).get(steps):
        raise OutputError(
            f"{output_dir} holds no checkpoint of iteration {steps:,}, the run's last (its newest "
            f"is {newest.name if newest else 'none'}), so its results cannot be made anew without "
            "training. Leave --again out to train to the end, which makes them."
        )


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
