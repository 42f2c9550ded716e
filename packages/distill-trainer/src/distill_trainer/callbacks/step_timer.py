"""Seconds an iteration, without making the device wait."""

from __future__ import annotations

import time
from collections import deque

from distill_protocols import Callback, RunState, StepRecord

from distill_trainer.plugins import StepTimerConfig


class StepTimerCallback(Callback):
    """Adds the mean over the last ``window`` iterations of these metrics.

    ``time/iteration``: from end to end, in seconds, everything included; ``time/step``: that less
    the wait for data (which the trainer reports as ``time/data``); ``samples_per_second``.

    There is no sync, so on an accelerator one iteration's figure is the time to *launch* it; over
    a window that holds a log point (which does wait) the mean is true.
    """

    name = "step_timer"

    def __init__(self, config: StepTimerConfig) -> None:
        self._ends: deque[float] = deque(maxlen=config.window + 1)
        self._waits: deque[float] = deque(maxlen=config.window)

    def on_step_start(self, run: RunState) -> None:
        if not self._ends:
            self._ends.append(time.perf_counter())

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        self._ends.append(time.perf_counter())
        self._waits.append(float(step.metrics["time/data"]))
        seconds = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
        run.metrics["time/iteration"] = seconds
        run.metrics["time/step"] = seconds - sum(self._waits) / len(self._waits)
        run.metrics["samples_per_second"] = run.global_batch_size / seconds
