"""Where numbers, texts and clips go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill_trainer.config import TrackerName

if TYPE_CHECKING:
    from distill_protocols import Tracker


def build_trackers(names: Sequence[TrackerName], output_dir: str | Path) -> tuple[Tracker, ...]:
    """The trackers called ``names``, writing into ``output_dir``.

    Raises:
        ConfigError: wandb was asked for and is not installed.
    """
    return tuple(_build(name, Path(output_dir)) for name in names)


def _build(name: TrackerName, output_dir: Path) -> Tracker:
    # Imports here: whoever logs to a file alone shall not wait for tensorboard.
    if name == "tensorboard":
        from distill_trainer.trackers.tensorboard import TensorBoardTracker

        return TensorBoardTracker(output_dir / "tensorboard")
    if name == "wandb":
        from distill_trainer.trackers.wandb import WandbTracker

        return WandbTracker(output_dir)
    from distill_trainer.trackers.jsonl import JsonlTracker

    return JsonlTracker(output_dir / "metrics.jsonl")
