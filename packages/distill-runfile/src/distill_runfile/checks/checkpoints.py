"""Checkpoints: what a run goes on from, what it exports, and which it keeps."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from distill_checkpoint import preview_resume
from distill_checkpoint.config import CheckpointConfig
from distill_conditioning.buckets import describe_order, position_problem
from distill_protocols import MethodConfig, Problem, SamplerSpec, below
from distill_runtime import export_folder_problem
from distill_trainer.config import TrainingConfig

from distill_runfile.checks.validation import validation_metrics
from distill_runfile.draft import Draft


def check_checkpoints(draft: Draft) -> Iterator[Problem]:
    """Rules over ``checkpoint``."""
    checkpoint = draft.checkpoint
    if checkpoint is None:
        return
    if checkpoint.resume not in ("none", "latest") and not Path(checkpoint.resume).is_dir():
        yield Problem(
            ("checkpoint", "resume"),
            f"there is no folder {checkpoint.resume}; write latest, none, or the path of one "
            "checkpoint-<iteration> folder",
        )
    yield from _export_problems(draft, checkpoint)
    yield from _keep_best_problems(draft, checkpoint)


def check_resume(draft: Draft, resolved: Mapping[str, object]) -> Iterator[Problem]:
    """Rules over the checkpoint that the run would go on from, before any model is loaded.

    Args:
        resolved: the whole file as plain values.
    """
    if draft.checkpoint is None or draft.training is None:
        return
    preview = preview_resume(draft.checkpoint, Path(draft.training.output_dir), resolved)
    if preview is None:
        return
    yield from preview.problems
    datasets = draft.datasets
    if datasets is None or draft.data is None or preview.takes_other_data:
        return
    own = describe_order(
        datasets.sources,
        seed=draft.training.seed,
        shuffle=draft.data.shuffle,
        held_out=(draft.validation.share if draft.validation else None) or 0.0,
    )
    problem = position_problem(preview.position, own)
    if problem is not None:
        yield Problem(
            ("data", "sets" if draft.data.sets else "path"),
            f"{problem} ({preview.folder}). Put data set and run file back as they were, start a "
            "new run in another output_dir, or say that another data set is meant, which is then "
            "read from its beginning (checkpoint.changes: {added: [data], dropped: [data]})",
        )


def _export_problems(draft: Draft, checkpoint: CheckpointConfig) -> Iterator[Problem]:
    for i, export in enumerate(checkpoint.export):
        problems = [*draft.run.role_problems(export.role, ema=export.ema)]
        if draft.family is not None and export.role in draft.run.roles:
            request = export.request(draft.run.student_sampler or SamplerSpec(steps=1))
            role = draft.run.roles[export.role]
            problems += draft.family.plugin.export_problems(role, request)
        if draft.training is not None:
            folder = Path(draft.training.output_dir, export.folder)
            if message := export_folder_problem(folder):
                problems.append(Problem("folder", message))
        yield from below(problems, "checkpoint", "export", str(i))


def _keep_best_problems(draft: Draft, checkpoint: CheckpointConfig) -> Iterator[Problem]:
    """The metric to keep by, against what callbacks and the method measure, and when."""
    if checkpoint.keep_best is None or draft.training is None or draft.method is None:
        return
    path = ("checkpoint", "keep_best", "metric")
    metric = checkpoint.keep_best.metric
    steps, saves = draft.training.max_train_steps, checkpoint.every_steps or 0
    by_callback: dict[str, int] = {}
    for callback in draft.callbacks.values():
        if callback.config is not None:
            by_callback |= callback.plugin.metrics(callback.config)
    by_callback |= validation_metrics(draft)
    owner = metric.split("/")[0]
    section = owner if owner == "validation" else f"callbacks.{owner}"
    if metric in by_callback:
        interval = by_callback[metric]
        if not 0 < math.lcm(interval, saves) <= steps:
            yield Problem(
                path,
                f"{metric!r} is measured every {interval} iterations and saves come every {saves} "
                f"(0: at the end only), which never meet in {steps} iterations; a checkpoint is "
                f"judged by what was measured in its own. Set {section}.every_steps and "
                "checkpoint.every_steps alike",
            )
        return
    config = draft.method.config
    # No schedule of updates is longer than this; a run may be.
    by_method = {n for i in range(1, min(steps, 1_000) + 1) for n in config.metrics(i)}
    if metric not in by_method:
        measured = sorted({*by_callback, *by_method})
        near = difflib.get_close_matches(metric, measured, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        yield Problem(
            path,
            f"{metric!r} is measured by no callback of this file, and not by "
            f"{draft.method.plugin.name}{hint} (measured: {', '.join(measured)}); name one, or add "
            "the callback",
            # One that could not be read measures nothing that is known.
            follows_from=("callbacks", owner),
        )
    elif not _meets_a_save(config, metric, draft.training, saves):
        log_every = draft.training.log_every
        way_out = (
            f"a loss is the mean since the last log point, so let checkpoint.every_steps be a "
            f"multiple of training.log_every ({log_every}) after which it is measured"
            if metric.startswith("loss/")
            else "let checkpoint.every_steps be a multiple of the interval at which it is measured"
        )
        yield Problem(
            path,
            f"{metric!r} is never measured in an iteration that is saved (every {saves}); a "
            f"checkpoint is judged by what was measured in its own. Here {way_out}",
        )


def _meets_a_save(config: MethodConfig, metric: str, training: TrainingConfig, saves: int) -> bool:
    """Return whether ``metric``, one of the method's, is there in some iteration that is saved."""
    for iteration in range(saves, min(training.max_train_steps, _SAVES * saves) + 1, saves):
        if not metric.startswith("loss/"):
            window = range(iteration, iteration + 1)
        elif iteration % training.log_every:
            continue
        else:
            # From the end: where turns are short, the answer is there.
            first = max(1, iteration - training.log_every + 1)
            window = range(iteration, first - 1, -1)
        if any(metric in config.metrics(i) for i in window):
            return True
    return False


_SAVES = 100
"""So many saves are looked at: a schedule of updates that meets none of them meets none."""
