"""What a step gave out, on disk, to look at after the fact."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_protocols import Callback, NonFiniteLossError, RunState, StepRecord
from safetensors.torch import save_file
from torch import Tensor

from distill_trainer.numbers import to_floats
from distill_trainer.plugins import DebugDumpConfig
from distill_trainer.shards import local


class DebugDumpCallback(Callback):
    """Writes ``debug/iteration-<n>/`` with ``outputs.safetensors`` and ``step.json``.

    After an error, ``debug/error-<n>/`` holds the last finished step, the error's text and, for a
    loss that is not finite, its terms and the batch's ids.

    Every rank of several writes its own (``...-rank-<n>``), and of what is sharded its own part:
    after an error nobody else may answer.
    """

    name = "debug_dump"

    def __init__(self, config: DebugDumpConfig) -> None:
        self.config = config
        self._last: StepRecord | None = None

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if self.config.on_exception:
            self._last = step
        if self.config.every_steps and step.iteration % self.config.every_steps == 0:
            _write(_folder(run, f"iteration-{step.iteration:06d}"), _facts(step), step.outputs)

    def on_exception(self, run: RunState, error: BaseException) -> None:
        if not self.config.on_exception:
            return
        facts: dict[str, Any] = {
            "iteration": run.iteration, "error": f"{type(error).__name__}: {error}",
        }  # fmt: skip
        if isinstance(error, NonFiniteLossError):
            facts["losses"] = {name: _plain(value) for name, value in error.losses.items()}
            facts["batch_ids"] = list(error.batch_ids)
        if self._last is not None:
            facts["last_finished_step"] = _facts(self._last)
        outputs = self._last.outputs if self._last is not None else {}
        _write(_folder(run, f"error-{run.iteration:06d}"), facts, outputs)


def _folder(run: RunState, name: str) -> Path:
    rank = f"-rank-{run.ranks.rank}" if run.ranks.size > 1 else ""
    return run.output_dir / "debug" / f"{name}{rank}"


def _facts(step: StepRecord) -> dict[str, Any]:
    return {
        "iteration": step.iteration,
        "losses": _floats(step.losses),
        "metrics": _floats(step.metrics),
        "stepped": list(step.stepped),
    }


def _floats(values: Mapping[str, Tensor | float]) -> dict[str, float | str]:
    numbers = to_floats(list(values.values()))
    return {name: _plain(number) for name, number in zip(values, numbers, strict=True)}


def _plain(value: float) -> float | str:
    # JSON has no nan and no inf; most readers refuse the words.
    return value if abs(value) < float("inf") else str(value)


def _write(folder: Path, facts: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> None:
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tensors = {
        name: local(value.detach()).contiguous().cpu().clone() for name, value in outputs.items()
    }
    save_file(tensors, part / "outputs.safetensors")
    (part / "step.json").write_text(json.dumps(facts, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
