"""What a run has to show for itself at its end: a table of paths, and what to do next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from distill_checkpoint import list_checkpoints
from distill_runfile import RunConfig
from distill_trainer import TrainResult

_FILES = (
    ("report page", "report.html"),
    ("report", "report.json"),
    ("contact sheet", "contact_sheet.png"),
    ("clips", "clips.mp4"),
    ("validation", "validation"),
    ("alarms", "health.jsonl"),
    ("numbers", "metrics.jsonl"),
    ("TensorBoard", "tensorboard"),
)


def describe_end(config: RunConfig, result: TrainResult, seconds: float) -> str:
    """Describe how a run ended, where its results are, and the commands that come next."""
    output = Path(config.training.output_dir)
    end = "stopped" if result.stop_reason else "finished"
    why = f": {result.stop_reason};" if result.stop_reason else " in"
    updates = ", ".join(f"{key} {count:,}" for key, count in result.updates.items())
    rows = list(_results(config, output))
    width = max((len(what) for what, _ in rows), default=0)
    lines = [
        f"{end} after iteration {result.iteration:,} of {config.training.max_train_steps:,}{why} "
        f"{_duration(seconds)}; updates: {updates}",
        *(f"  {what.ljust(width)}  {where}" for what, where in rows),
    ]
    if result.stop_reason is not None:
        lines.append("to go on: the same command again")
    elif rows:
        lines += ["next:", *(f"  {command}" for command in _next_commands(config, output))]
    return "\n".join(lines)


def _results(config: RunConfig, output: Path) -> Iterator[tuple[str, str]]:
    for export in config.checkpoint.export:
        folder = output / export.folder
        if folder.exists():
            weights = ", EMA" if export.ema else ""
            yield f"{export.role} ({export.format}{weights})", _shown(folder)
    yield from ((what, _shown(output / name)) for what, name in _FILES if (output / name).exists())
    checkpoints = list_checkpoints(output)
    if checkpoints:
        newest = checkpoints[max(checkpoints)]
        more = f" and {len(checkpoints) - 1} before it" if len(checkpoints) > 1 else ""
        yield "checkpoint", f"{_shown(newest)}{more}"


def _next_commands(config: RunConfig, output: Path) -> Iterator[str]:
    folder = shlex.quote(_shown(output))
    views = config.validation.views.values() if config.validation else ()
    if list_checkpoints(output) and "student" in config.roles:
        prompt = config.validation.prompts[0] if config.validation else "a prompt of yours"
        beside = any(view.role == "teacher" and view.sampler is not None for view in views)
        also = " --also teacher" if beside else ""
        yield f"uv run apps/sample {folder} --prompt {shlex.quote(prompt)}{also}"
    page = output / "report.html"
    if page.exists():
        yield f"open {shlex.quote(_shown(page))} in a browser"
    else:
        yield f"uv run apps/report {folder}   # makes a page of the run"


def _shown(path: Path) -> str:
    """Return ``path`` as one would type it here: relative where it is below this folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
