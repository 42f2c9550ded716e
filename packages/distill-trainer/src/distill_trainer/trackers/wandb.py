"""Numbers, texts and clips for Weights & Biases (``wandb`` is an optional extra)."""

from __future__ import annotations

import hashlib
import importlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_media import clips_to_gif
from distill_protocols import ConfigError, RunDescription
from distill_runtime import to_uint8
from torch import Tensor


class WandbTracker:
    """One wandb run, its files in ``output_dir/wandb``; resumed by the output folder's path.

    Settings are its config, the run file and the final numbers (``final/...``) are in its summary.
    A resumed run logs iterations that a killed process had logged already; wandb keeps the first
    of two values for a step, which are equal.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, output_dir: str | Path) -> None:
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                [
                    "the tracker 'wandb' needs the package wandb, which is not installed; it is an "
                    "optional extra, as it talks to a service. Install wandb, or leave the tracker "
                    "out."
                ]
            ) from error
        self.output_dir = Path(output_dir)
        self._run: Any = None
        self._description = RunDescription(name=self.output_dir.name)

    def describe(self, description: RunDescription) -> None:
        """Keep what the run is for the start of the wandb run, which is at its first number."""
        self._description = description

    def log_scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._open().log(dict(values), step=iteration)

    def log_summary(self, iteration: int, values: Mapping[str, float]) -> None:
        """Log final numbers, by which wandb's table compares runs."""
        self._open().summary.update({f"final/{name}": value for name, value in values.items()})

    def log_text(self, iteration: int, name: str, text: str) -> None:
        self._open().summary[name] = text

    def log_video(self, iteration: int, name: str, clips: Tensor, fps: float) -> None:
        gif = self._wandb.Video(
            io.BytesIO(clips_to_gif(to_uint8(clips).numpy(), fps)), format="gif"
        )
        self._open().log({name: gif}, step=iteration)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

    def _open(self) -> Any:
        if self._run is None:
            # A hash of the whole path: a resumed run continues its own wandb run, and never one of
            # another folder of the same name.
            path = str(self.output_dir.resolve())
            run_id = hashlib.blake2b(path.encode(), digest_size=8).hexdigest()
            self._run = self._wandb.init(
                dir=path,
                id=run_id,
                name=self._description.name,
                config=dict(self._description.settings),
                resume="allow",
            )
            if self._description.run_file:
                self._run.summary["run_file"] = self._description.run_file
        return self._run
