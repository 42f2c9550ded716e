"""Files that show what happened inside a run: dumps of a step's tensors, profiler traces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from distill_protocols import Callback, NonFiniteLossError, RunState, StepRecord
from distill_runtime import fetch_floats, json_text, local_shard, replace_file, replace_folder
from safetensors.torch import save
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distill_trainer.callbacks.configs import DebugDumpConfig, ProfilerConfig


class DebugDumpCallback(Callback):
    """Writes ``debug/iteration-<n>/`` with ``outputs.safetensors`` and ``step.json``.

    After an error, ``debug/error-<n>/`` holds the last finished step, the error's text and, for a
    loss that is not finite, its terms and the batch's ids.

    Every rank of several writes its own (``...-rank-<n>``), and of sharded tensors its own shard:
    after an error no other rank may answer.
    """

    name = "debug_dump"

    def __init__(self, config: DebugDumpConfig) -> None:
        self.config = config
        self._last: StepRecord | None = None

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if self.config.on_exception:
            self._last = step
        if self.config.every_steps and step.iteration % self.config.every_steps == 0:
            folder = _dump_folder(run, f"iteration-{step.iteration:06d}")
            _write_dump(folder, _describe_step(step), step.outputs)

    def on_exception(self, run: RunState, error: BaseException) -> None:
        if not self.config.on_exception:
            return
        description: dict[str, object] = {
            "iteration": run.iteration, "error": f"{type(error).__name__}: {error}",
        }  # fmt: skip
        if isinstance(error, NonFiniteLossError):
            description["losses"] = {n: _json_number(value) for n, value in error.losses.items()}
            description["batch_ids"] = list(error.batch_ids)
        if self._last is not None:
            description["last_finished_step"] = _describe_step(self._last)
        outputs = self._last.outputs if self._last is not None else {}
        _write_dump(_dump_folder(run, f"error-{run.iteration:06d}"), description, outputs)


def _dump_folder(run: RunState, name: str) -> Path:
    rank = f"-rank-{run.ranks.rank}" if run.ranks.size > 1 else ""
    return run.output_dir / "debug" / f"{name}{rank}"


def _describe_step(step: StepRecord) -> dict[str, object]:
    return {
        "iteration": step.iteration,
        "losses": _json_numbers(step.losses),
        "metrics": _json_numbers(step.metrics),
        "stepped": list(step.stepped),
    }


def _json_numbers(values: Mapping[str, Tensor | float]) -> dict[str, float | str]:
    numbers = fetch_floats(list(values.values()))
    return {name: _json_number(number) for name, number in zip(values, numbers, strict=True)}


def _json_number(value: float) -> float | str:
    # JSON has no nan and no inf; most readers refuse the words.
    return value if math.isfinite(value) else str(value)


def _write_dump(
    folder: Path, description: Mapping[str, object], outputs: Mapping[str, Tensor]
) -> None:
    tensors = {
        name: local_shard(value.detach()).contiguous().cpu().clone()
        for name, value in outputs.items()
    }
    with replace_folder(folder) as stage:
        # Not safetensors' own writer, whose error on a full disk is no OSError.
        (stage / "outputs.safetensors").write_bytes(save(tensors))
        (stage / "step.json").write_text(json_text(description))


class ProfilerCallback(Callback):
    """Writes ``profile/trace-<first>-<last>.json`` (Chrome trace: open it in Perfetto).

    Rank 0 writes one, or each rank does (``all_ranks``), with ``-rank-<n>`` at the end of its name.
    """

    name = "profiler"

    def __init__(self, config: ProfilerConfig) -> None:
        self.config = config
        self._profile: profile | None = None
        self._first = 0

    def on_step_start(self, run: RunState) -> None:
        if run.iteration == self.config.start and (run.ranks.is_first or self.config.all_ranks):
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._first = run.iteration
            self._profile = profile(activities=activities, record_shapes=self.config.shapes)
            self._profile.start()

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if self._profile is not None and step.iteration - self._first + 1 >= self.config.steps:
            self._write(run)

    def on_train_end(self, run: RunState) -> None:
        if self._profile is not None and run.iteration >= self._first:
            self._write(run)
        self._discard()  # a stop has rolled back the first iteration of the trace

    def on_exception(self, run: RunState, error: BaseException) -> None:
        self._discard()

    def _discard(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, run: RunState) -> None:
        trace, self._profile = self._profile, None
        assert trace is not None, "callers write only a trace that was started"
        trace.stop()
        rank = f"-rank-{run.ranks.rank}" if self.config.all_ranks and run.ranks.size > 1 else ""
        name = f"trace-{self._first:06d}-{run.iteration:06d}{rank}.json"
        with replace_file(run.output_dir / "profile" / name) as part:
            trace.export_chrome_trace(str(part))
