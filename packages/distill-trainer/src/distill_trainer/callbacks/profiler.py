"""A trace of a few iterations."""

from __future__ import annotations

import os
from typing import Any

import torch
from distill_protocols import Callback, RunState, StepRecord
from torch.profiler import ProfilerActivity, profile

from distill_trainer.plugins import ProfilerConfig


class ProfilerCallback(Callback):
    """Writes ``profile/trace-<first>-<last>.json`` (Chrome trace: open it in Perfetto).

    Of rank 0, or of all (``all_ranks``), each with ``-rank-<n>`` at the end of its name.
    """

    name = "profiler"

    def __init__(self, config: ProfilerConfig) -> None:
        self.config = config
        self._profile: Any = None
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
        self._drop()  # the first iteration of the trace was taken back by a stop

    def on_exception(self, run: RunState, error: BaseException) -> None:
        self._drop()

    def _drop(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, run: RunState) -> None:
        trace, self._profile = self._profile, None
        trace.stop()
        folder = run.output_dir / "profile"
        folder.mkdir(exist_ok=True)
        rank = f"-rank-{run.ranks.rank}" if self.config.all_ranks and run.ranks.size > 1 else ""
        target = folder / f"trace-{self._first:06d}-{run.iteration:06d}{rank}.json"
        # torch picks the format by the name's end.
        part = target.with_suffix(".part.json")
        trace.export_chrome_trace(str(part))
        os.replace(part, target)
