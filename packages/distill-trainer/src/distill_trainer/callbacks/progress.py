"""How far the run is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from typing import TextIO

from distill_protocols import Callback, RunState, StepRecord
from distill_runtime import fetch_floats
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


class ProgressCallback(Callback):
    """Iteration, newest value of every loss term, iterations a second, time left; and how far a
    hook is that takes long (``RunState.report_progress``).

    Rank 0 writes; losses are means over the ranks, so that they do not depend on their number. As
    long as there is a bar, what is logged to the terminal is printed above it.

    Args:
        log_every: iterations between two times that the losses are read (each waits for the
            device), and between two lines where there is no terminal.
        stream: where to write; None: stderr, so that stdout stays for results.
        seconds_between_lines: a fast run prints no line for log points that are closer together.
        seconds_between_work_lines: the same for lines about work within a hook, the first one
            included: what is done sooner needs no line.
    """

    name = "progress"

    def __init__(
        self,
        log_every: int,
        stream: TextIO | None = None,
        *,
        seconds_between_lines: float = 2.0,
        seconds_between_work_lines: float = 5.0,
    ) -> None:
        self.log_every = log_every
        self.seconds_between_lines = seconds_between_lines
        self.seconds_between_work_lines = seconds_between_work_lines
        self._last_line = -math.inf
        self._last_work_line = -math.inf
        self._has_work_line = False
        self._stream = stream
        self._bar: tqdm | None = None
        self._work: tqdm | None = None
        self._logs = contextlib.ExitStack()
        self._losses: dict[str, Tensor] = {}
        self._start: tuple[float, int] | None = None

    def on_train_start(self, run: RunState) -> None:
        if run.ranks.is_first:
            run.report_progress = self._show_work

    def on_step_start(self, run: RunState) -> None:
        if self._start is None and run.ranks.is_first:
            # Here rather than at on_train_start: only now is a resume over.
            done = run.iteration - 1
            self._start = (time.monotonic(), done)
            if self._out.isatty():
                self._bar = tqdm(
                    total=run.max_train_steps, initial=done, unit="it", file=self._out,
                    dynamic_ncols=True,
                )  # fmt: skip
                self._logs.enter_context(logging_redirect_tqdm())

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        self._losses |= step.losses
        terms = ""
        if step.iteration % self.log_every == 0 or step.iteration == run.max_train_steps:
            shown = self._bar is not None or (run.ranks.is_first and self._is_line_due(run))
            # Only rank 0 knows whether a line is due, so the others always send theirs.
            if shown or run.ranks.size > 1:
                terms = self._mean_losses(run)
            if shown and self._bar is None:
                self._print_line(run, terms)
        if self._bar is not None:
            if terms:
                self._bar.set_postfix_str(terms, refresh=False)
            self._bar.update()

    def on_train_end(self, run: RunState) -> None:
        self.close()

    def on_exception(self, run: RunState, error: BaseException) -> None:
        # The bar's line must be ended, or the traceback starts behind it.
        self.close()

    def close(self) -> None:
        """End the bar's line; what is printed next begins on a line of its own."""
        for bar in (self._work, self._bar):
            if bar is not None:
                bar.close()
        self._work = self._bar = None
        self._logs.close()

    @property
    def _out(self) -> TextIO:
        return self._stream or sys.stderr

    def _mean_losses(self, run: RunState) -> str:
        # total_loss is a sum of other terms, or another role's on each turn: shown only alone.
        names = [name for name in self._losses if name != "total_loss"] or list(self._losses)
        values = fetch_floats([self._losses[name] for name in names])
        run.check_in_sync("progress")
        by_rank = run.ranks.gather_results(lambda: dict(zip(names, values, strict=True)))
        by_name: dict[str, list[float]] = {}
        for losses in by_rank:
            for name, value in losses.items():
                by_name.setdefault(name, []).append(value)
        return " ".join(f"{name} {sum(of) / len(of):.4g}" for name, of in by_name.items())

    def _is_line_due(self, run: RunState) -> bool:
        now = time.monotonic()
        if now - self._last_line < self.seconds_between_lines:
            return run.iteration == run.max_train_steps
        self._last_line = now
        return True

    def _print_line(self, run: RunState, terms: str) -> None:
        assert self._start is not None
        start, done = self._start
        rate = (run.iteration - done) / max(time.monotonic() - start, 1e-9)
        left = tqdm.format_interval((run.max_train_steps - run.iteration) / rate)
        share = run.iteration / run.max_train_steps
        print(
            f"{run.iteration}/{run.max_train_steps} ({share:.0%})  {terms}  "
            f"{rate:.2f} it/s  {left} left",
            file=self._out,
            flush=True,
        )

    def _show_work(self, what: str, done: int, total: int) -> None:
        """Show work within a hook: in front of the bar; without one, as a bar of its own, which
        leaves no trace; where there is no terminal, as a line now and then."""
        if not self._out.isatty():
            now = time.monotonic()
            if done == 0:
                self._last_work_line, self._has_work_line = now, False
            is_due = now - self._last_work_line >= self.seconds_between_work_lines
            # What was shown to be under way is shown to be done, once.
            if self._has_work_line if done >= total else done and is_due:
                self._last_work_line, self._has_work_line = now, done < total
                print(f"{what}: {done}/{total}", file=self._out, flush=True)
        elif self._bar is not None:
            self._bar.set_description_str(f"{what} {done}/{total}" if done < total else "")
        else:
            self._show_work_bar(what, done, total)

    def _show_work_bar(self, what: str, done: int, total: int) -> None:
        if self._work is not None and (self._work.desc, self._work.total) != (what, total):
            self._work.close()
            self._work = None
        if self._work is None and done < total:
            self._work = tqdm(total=total, desc=what, file=self._out, dynamic_ncols=True,
                              leave=False)  # fmt: skip
        if self._work is not None:
            self._work.n = done
            self._work.refresh()
            if done >= total:
                self._work.close()
                self._work = None
