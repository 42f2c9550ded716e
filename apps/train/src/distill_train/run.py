"""One run, from a checked file to its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
from distill_checkpoint import claim_output_dir, find_newest_checkpoint, list_checkpoints
from distill_protocols import OutputError
from distill_runfile import RunConfig, export_warnings
from distill_runtime import counted, device_type, sigterm_as_interrupt
from distill_trainer import (
    FLASH_VERSIONS,
    Distribution,
    TrainResult,
    check_same_run,
    use_flash_version,
)

from distill_train.build import Run, build
from distill_train.closing import describe_end
from distill_train.record import RunRecord

_log = logging.getLogger(__name__)


def run(
    config: RunConfig, *, again: Collection[str] = (), run_file: Path | None = None
) -> TrainResult:
    """Claim the output folder, build everything, train; on every rank that torchrun started.

    Args:
        again: names of callbacks ("export" and "validation" among them) whose results at the end
            are made anew: the run is complete, and does nothing else.
        run_file: that ``config`` was read from, for the record of the run.

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
        use_flash_version(config.training.attention_backend, distribution.device),
    ):
        # Before the folder is claimed, which may be another one on each rank.
        check_same_run(distribution.ranks, config.resolved)
        if again:
            distribution.ranks.run_each(lambda: _refuse_unfinished(config, output_dir))
        with claim_output_dir(output_dir, resume=resume, ranks=distribution.ranks) as claim:
            parts: Run | None = None
            try:
                record = distribution.ranks.run_each(
                    lambda: RunRecord.of_this_start(config, run_file, distribution)
                )
                text = record.run_file["text"] if record.run_file is not None else ""
                parts = build(config, distribution=distribution, again=again, run_file=text)
                _log.info("%s", _opening(config, distribution, time.perf_counter() - started))
                for warning in export_warnings(config):
                    _log.warning("%s", warning)
                for note in config.notes:
                    _log.info("%s", note)
                if not again:
                    distribution.ranks.run_on_first(record.write)
                result = parts.trainer.run(parts.method, parts.loader)
                if not again:
                    end = partial(record.write_end, result.iteration, result.stop_reason)
                    distribution.ranks.run_on_first(end)
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
    _log.info("%s", describe_end(config, result, time.perf_counter() - started))
    return result


def _refuse_unfinished(config: RunConfig, output_dir: Path) -> None:
    steps, newest = config.training.max_train_steps, find_newest_checkpoint(output_dir)
    if newest is None or newest != list_checkpoints(output_dir).get(steps):
        raise OutputError(
            f"{output_dir} holds no checkpoint of iteration {steps:,}, the run's last (its newest "
            f"is {newest.name if newest else 'none'}), so its results cannot be made anew without "
            "training. Leave --again out to train to the end, which makes them."
        )


def _opening(config: RunConfig, distribution: Distribution, seconds: float) -> str:
    size = distribution.ranks.size
    devices = distribution.device.type
    if size > 1:
        training = config.training
        devices = (
            f"{size} processes ({devices}, {distribution.strategy}), "
            f"{training.micro_batch(size)} samples each in "
            f"{counted(training.accumulation(size), 'micro step')}"
        )
    return (
        f"ready after {seconds:.1f} s on {devices}, attention: {_kernels(config)}; output: "
        f"{config.training.output_dir}"
    )


def _kernels(config: RunConfig) -> str:
    """Name the attention kernels, each with its roles where they differ."""
    of_all = config.training.attention_backend
    default = f"torch's choice ({of_all})" if of_all in FLASH_VERSIONS else "torch's choice"
    roles: dict[str, list[str]] = {}
    for name, role in config.roles.items():
        if role.spec.heads is None:
            roles.setdefault(role.spec.attention_backend or default, []).append(name)
    if len(roles) == 1:
        return next(iter(roles))
    return ", ".join(f"{kernel} ({', '.join(names)})" for kernel, names in roles.items())
