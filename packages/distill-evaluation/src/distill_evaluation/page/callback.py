"""The ``page`` callback: keeps ``report.html`` up to date while a run is under way."""

from __future__ import annotations

import logging
import time

from distill_protocols import Callback, RunState, StepRecord

from distill_evaluation.page.clips import ClipStore
from distill_evaluation.page.config import PageConfig
from distill_evaluation.page.document import write_page
from distill_evaluation.page.runs import METRICS_FILE, State, read_run
from distill_evaluation.page.series import MetricsReader

PAGE = "report.html"
MOST_SHARE = 0.01
"""Of the time of a run; a page that would take more waits for the next occasion."""

_log = logging.getLogger(__name__)


class PageCallback(Callback):
    """Writes the page from what lies in the output folder; rank 0 alone, and nothing else reads it.

    A page that cannot be made is a warning: no run shall end by its own description.
    """

    name = "page"
    only_observes = True

    def __init__(self, config: PageConfig) -> None:
        self.config = config
        self._store = ClipStore()
        self._metrics: MetricsReader | None = None
        self._next = 0.0

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        if run.ranks.is_first and time.monotonic() >= self._next and self._is_due(run, step):
            self._write(run, "running")

    def on_train_end(self, run: RunState) -> None:
        if run.ranks.is_first:
            self._write(run, "finished" if run.stop_reason is None else "stopped", run.stop_reason)

    def on_exception(self, run: RunState, error: BaseException) -> None:
        if run.ranks.is_first:
            self._write(run, "stopped", f"{type(error).__name__}: {error}")

    def _is_due(self, run: RunState, step: StepRecord) -> bool:
        every = self.config.every_steps
        folder = run.output_dir / "validation" / f"iteration-{step.iteration:06d}"
        return (
            (every > 0 and step.iteration % every == 0)
            or any(name.startswith("report/") for name in step.metrics)
            or folder.exists()
        )

    def _write(self, run: RunState, state: State, end: str | None = None) -> None:
        began = time.monotonic()
        try:
            if self._metrics is None:
                self._metrics = MetricsReader(run.output_dir / METRICS_FILE)
            shown = read_run(run.output_dir, metrics=self._metrics)
            shown.state, shown.end = state, end
            write_page([shown], run.output_dir / PAGE, store=self._store)
        except Exception as error:
            _log.warning("%s could not be written: %s: %s", PAGE, type(error).__name__, error)
        now = time.monotonic()
        self._next = now + (now - began) / MOST_SHARE
