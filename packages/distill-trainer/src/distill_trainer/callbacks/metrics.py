"""Numbers to the trackers, every few iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill_protocols import Callback, RunState, StepRecord
from torch import Tensor

from distill_trainer.numbers import to_floats


class MetricsCallback(Callback):
    """Logs the mean since the last log point of every loss and metric, rates and update counts.

    A mean, not the newest value: with two roles that take turns, the turn that falls on a log
    point may always be the same role's, and the other's losses would never be seen. Values stay
    on their device until the log point, and are then fetched in one go.

    On several ranks it is the mean over all of their values. What only some of them have (the
    report is rank 0's, a loss term may need a sample of some kind) counts where it is, as it does
    with the iterations that lack it.

    Logged: ``loss/<term>``, metrics under their own names, ``lr/<role.module>`` (of the next
    step), ``updates/<role.module>``, and ``grad_scale`` under fp16.
    """

    name = "metrics"

    def __init__(self, log_every: int) -> None:
        self.log_every = log_every
        self._kept: dict[str, list[Tensor | float]] = {}

    def on_step_end(self, run: RunState, step: StepRecord) -> None:
        for name, loss in step.losses.items():
            self._kept.setdefault(f"loss/{name}", []).append(loss)
        for name, value in step.metrics.items():
            self._kept.setdefault(name, []).append(value)
        if step.iteration % self.log_every == 0:
            self._log(run)

    def on_train_end(self, run: RunState) -> None:
        self._log(run)

    def _log(self, run: RunState) -> None:
        kept, self._kept = self._kept, {}
        # On all ranks alike, even if this one has nothing to say.
        run.check_in_sync("mean over ranks")
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for told in run.ranks.gather_results(lambda: _sums(kept)):
            for name, (total, count) in told.items():
                sums[name] = sums.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + count
        if not sums:
            return
        values = {name: total / counts[name] for name, total in sums.items()} | _state_of(run)
        for tracker in run.trackers:
            tracker.log_scalars(run.iteration, values)


def _sums(kept: Mapping[str, Sequence[Tensor | float]]) -> dict[str, tuple[float, int]]:
    """(sum, number of values) by name."""
    numbers = iter(to_floats([value for values in kept.values() for value in values]))
    return {
        name: (sum(next(numbers) for _ in values), len(values)) for name, values in kept.items()
    }


def _state_of(run: RunState) -> dict[str, float]:
    method = run.method
    values = {f"lr/{key}": opt.param_groups[0]["lr"] for key, opt in method.optimizer_dict.items()}
    values |= {f"updates/{key}": float(n) for key, n in method.update_counts.items()}
    if method.grad_scaler.is_enabled():
        values["grad_scale"] = method.grad_scaler.get_scale()
    return values
