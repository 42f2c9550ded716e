"""Several runs, each from the result of the one before: what ``--chain`` does."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

from attrs import frozen
from distill_checkpoint import finished_iteration
from distill_protocols import WeightsError
from distill_runfile import RunConfig, Stage
from distill_runfile.cli import EXIT_OK, say
from distill_runtime import UnreadableFileError, counted, parse_json, read_bytes

RunStage = Callable[[RunConfig, Path], int]
"""Trains one run, or says that it is finished; returns the exit status."""


@frozen(kw_only=True)
class Chain:
    """The runs of a chain in order, all of whose files are right.

    Attributes:
        read: reads a run file for training, once what it starts from is there.
        run: see ``RunStage``.
        is_first: of several processes one speaks and checks.
    """

    stages: Sequence[Stage]
    read: Callable[[Path], RunConfig]
    run: RunStage
    is_first: bool = True

    def run_all(self) -> int:
        """Run what is not finished, stage by stage; a stage that ends otherwise ends the chain.

        Returns:
            The exit status of the stage that ended it, or EXIT_OK.

        Raises:
            WeightsError: the result of a stage is not what the next one can start from.
        """
        count = len(self.stages)
        for number, stage in enumerate(self.stages, start=1):
            config = self.read(stage.file)
            self._say(f"stage {number} of {count}: {config.recipe.method}, {stage.file}")
            if self.is_first:
                check_starts(stage, config)
            status = self.run(config, stage.file)
            if status != EXIT_OK:
                self._say(
                    f"stage {number} of {count} is not finished; the same command goes on with it"
                )
                return status
            self._say(f"stage {number} of {count} is finished: {describe_result(config)}")
            # Roles and optimizers of the run that ended may be part of reference cycles.
            gc.collect()
        self._say(f"the chain is finished: {counted(count, 'stage')}")
        return EXIT_OK

    def _say(self, text: str) -> None:
        if self.is_first:
            say(text)


def check_starts(stage: Stage, config: RunConfig) -> None:
    """Check that no result which a finished stage started from was made anew since. (That each is
    there and whole, the check of the run file says.)

    Raises:
        WeightsError: one was.
    """
    own = Path(config.training.output_dir) / "run.json"
    if finished_iteration(own.parent) != config.training.max_train_steps:
        return
    for role, start in stage.starts.items():
        files = start.rglob("*.safetensors") if start.is_dir() else [start]
        if max(file.stat().st_mtime for file in files) > own.stat().st_mtime:
            raise WeightsError(
                f"{stage.file.name}: its run in {own.parent} is finished, and {start}, which "
                f"{role!r} started from, was made anew since. Its result is that of other weights. "
                f"Delete {own.parent}, or name another training.output_dir"
            )


def describe_result(config: RunConfig) -> str:
    """Describe a finished run in a line: how far it went, its last losses, and its exports."""
    output = Path(config.training.output_dir)
    parts = [f"{config.recipe.method}, {config.training.max_train_steps:,} iterations"]
    if losses := read_last_losses(output / "metrics.jsonl"):
        parts.append(", ".join(f"{name} {value:.4g}" for name, value in losses.items()))
    parts += [f"{export.role} in {output / export.folder}" for export in config.checkpoint.export]
    return "; ".join(parts)


def read_last_losses(file: Path) -> dict[str, float]:
    """Return the losses of the last line that has any; none where no such file can be read. A line
    that is damaged is left out, as it is only shown."""
    with contextlib.suppress(UnreadableFileError):
        for line in reversed(read_bytes(file).splitlines()):
            with contextlib.suppress(UnreadableFileError):
                values = parse_json(line, str(file))
                losses = {
                    name.removeprefix("loss/"): value
                    for name, value in (values.items() if isinstance(values, dict) else ())
                    if name.startswith("loss/") and isinstance(value, float)
                }
                if losses:
                    return losses
    return {}
