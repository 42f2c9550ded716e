"""What is measured and logged: means of losses and metrics, times, and numbers of parameters."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from distill_protocols import Callback, EpochLoader, ModelBundle, RankGroup, RunState, StepRecord
from distill_runtime import fetch_floats
from torch import Tensor

from distill_trainer.callbacks.configs import StepTimerConfig

_STATE = "since_last_log"
_OF_THE_MACHINE = ("time/", "memory/", "samples_per_second")


class MetricsCallback(Callback):
    """Logs the mean since the last log point of every loss and metric, rates and update counts.

    A mean, not the newest value: with two roles that take turns, the turn that falls on a log
    point may always be the same role's, and the other's losses would never be seen. Values stay
    on their device until the log point, and are then fetched in one go.

    On several ranks it is the mean over all of their values. What only some of them have (the
    report is rank 0's, a loss term may need a sample of some kind) counts where it is, as it does
    with the iterations that lack it.

    The values since the last log point are state, so that a resumed run logs the same means. A run
    that is stopped between two log points logs nothing more.

    Logged: ``loss/<term>``, metrics under their own names, ``lr/<role.module>`` (of the next
    step), ``updates/<role.module>``, ``progress/samples`` and ``progress/epochs`` (seen so far),
    and ``grad_scale`` under fp16.

    Attributes:
        newest: means of the newest log point at which each was logged, without those of the
            machine (times, memory).
    """

    name = "metrics"
    only_observes = True

    def __init__(self, log_every: int) -> None:
        self.log_every = log_every
        self._values: dict[str, list[Tensor | float]] = {}
        self._ranks: RankGroup | None = None
        self.newest: dict[str, float] = {}

    def on_train_start(self, run: RunState) -> None:
        self._ranks = run.ranks

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        for name, loss in step.losses.items():
            self._values.setdefault(f"loss/{name}", []).append(loss)
        for name, value in step.metrics.items():
            self._values.setdefault(name, []).append(value)
        if step.iteration % self.log_every == 0:
            self._log(run)

    def on_train_end(self, run: RunState) -> None:
        if run.iteration >= run.max_train_steps:  # else the run that goes on logs them
            self._log(run)

    def state_dict(self) -> dict[str, object]:
        """Return the values since the last log point, by rank and name; nothing right after one.

        Times and memory are left out: equal runs have equal checkpoints. All ranks call it
        together.
        """
        fetched = {name: fetch_floats(column) for name, column in self._values.items()}
        self._values = {name: list[Tensor | float](column) for name, column in fetched.items()}
        own: dict[str, list[float]] = {
            name: column for name, column in fetched.items() if not name.startswith(_OF_THE_MACHINE)
        }
        by_rank = [own] if self._ranks is None else self._ranks.gather_results(lambda: own)
        if not any(by_rank):
            return {}
        return {_STATE: {f"rank-{rank:05d}": values for rank, values in enumerate(by_rank)}}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        by_rank = list(cast(Mapping[str, dict[str, list[float]]], state[_STATE]).values())
        rank, size = (0, 1) if self._ranks is None else (self._ranks.rank, self._ranks.size)
        # Means are over all ranks, so with another number of them it does not matter whose these
        # are; only with the same number are the sums the same to the last bit.
        own = by_rank[rank : rank + 1] if size == len(by_rank) else by_rank if rank == 0 else []
        self._values = {}
        for values in own:
            for name, column in values.items():
                self._values.setdefault(name, []).extend(column)

    def _log(self, run: RunState) -> None:
        values, self._values = self._values, {}
        # All ranks come here alike, even one that has no value: the gather needs all of them.
        run.check_in_sync("mean over ranks")
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        for sums in run.ranks.gather_results(lambda: _sum_by_name(values)):
            for name, (total, count) in sums.items():
                totals[name] = totals.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + count
        if not totals:
            return
        means = {name: total / counts[name] for name, total in totals.items()}
        # As trackers show them, so that a checkpoint of this iteration can be kept by a loss.
        run.metrics |= {name: mean for name, mean in means.items() if name.startswith("loss/")}
        self.newest |= {n: mean for n, mean in means.items() if not n.startswith(_OF_THE_MACHINE)}
        scalars = means | _state_of(run)
        for tracker in run.trackers:
            tracker.log_scalars(run.iteration, scalars)


def _sum_by_name(
    values: Mapping[str, Sequence[Tensor | float]],
) -> dict[str, tuple[float, int]]:
    """Return (sum, number of values) by name."""
    numbers = iter(fetch_floats([value for column in values.values() for value in column]))
    return {
        name: (sum(next(numbers) for _ in column), len(column)) for name, column in values.items()
    }


def _state_of(run: RunState) -> dict[str, float]:
    method = run.method
    values = {f"lr/{key}": opt.param_groups[0]["lr"] for key, opt in method.optimizer_dict.items()}
    values |= {f"updates/{key}": float(n) for key, n in method.update_counts.items()}
    values["progress/samples"] = float(run.iteration * run.global_batch_size)
    if isinstance(run.loader, EpochLoader):
        values["progress/epochs"] = run.loader.epoch
    if method.grad_scaler.is_enabled():
        values["grad_scale"] = method.grad_scaler.get_scale()
    return values


class StepTimerCallback(Callback):
    """Adds the mean over the last ``window`` iterations of these metrics.

    ``time/iteration``: from end to end, in seconds, everything included; ``time/step``: that less
    the wait for data (which the trainer reports as ``time/data``); ``samples_per_second``. Also
    the peaks of memory so far, in GB (10^9): ``memory/host`` of this process, ``memory/device`` of
    its accelerator.

    The device is not waited for, so on an accelerator the time of one iteration is the time to
    *launch* it; over a window that holds a log point (which does wait) the mean is true.
    """

    name = "step_timer"

    def __init__(self, config: StepTimerConfig) -> None:
        # One more than the window: n iterations lie between n + 1 ends.
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
        run.metrics |= _memory_peaks()


def _memory_peaks() -> dict[str, float]:
    """Return the peaks of this process so far, in GB; of the device where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes there, else kB
    peaks = {"memory/host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}
    if torch.cuda.is_available():
        peaks["memory/device"] = torch.cuda.max_memory_allocated() / 1e9
    return peaks


class ParamCountCallback(Callback):
    """Logs a table of parameters, all and trainable, by module; once, at the first iteration."""

    name = "param_count"

    def on_step_start(self, run: RunState) -> None:
        # Not once a process: the table of a resumed run is there already.
        if run.iteration != 1 or not run.trackers:
            return
        table = parameter_table(run.method.bundle)
        for tracker in run.trackers:
            tracker.log_text(run.iteration, "parameters", table)


def parameter_table(bundle: ModelBundle) -> str:
    """Make a Markdown table: module, parameters, trainable parameters."""
    lines = ["| module | parameters | trainable |", "|---|---:|---:|"]
    for name, role in bundle.roles.items():
        for key, module in role.modules.items():
            count = sum(p.numel() for p in module.parameters())
            # By the optimizer, not by requires_grad: methods switch that off and on by turns.
            optimizer = role.optimizers.get(key)
            groups = optimizer.param_groups if optimizer else []
            moving = sum(p.numel() for group in groups for p in group["params"])
            lines.append(f"| {name}.{key} | {count:,} | {moving:,} |")
    return "\n".join(lines)
