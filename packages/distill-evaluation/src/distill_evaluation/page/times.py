"""Where the time of a run went."""

from __future__ import annotations

from attrs import frozen

from distill_evaluation.page.series import MetricsReader, Series

_CALLBACK = "time/callback/"
_SHOWN = 0.001
"""Share of the whole below which something is not listed by itself."""
_LONGEST_PAUSE = 20.0
"""A gap of so many times the usual one between two log points is no training: the run stood
still."""


@frozen(kw_only=True)
class TimeShare:
    """What took how many seconds of the logged part of a run."""

    name: str
    seconds: float


def time_shares(metrics: MetricsReader) -> list[TimeShare]:
    """Divide the time between the first and the last log point; empty where nothing was logged.

    The waits for data, saves and callbacks are what the trainer measured; training is the rest.
    """
    times = metrics.times
    if len(times) < 2:
        return []
    gaps = [b - a for a, b in zip(times.values, times.values[1:], strict=False)]
    usual = sorted(gaps)[len(gaps) // 2]
    counted = {
        end: max(0.0, gap)
        for end, gap in zip(times.iterations[1:], gaps, strict=True)
        if gap <= _LONGEST_PAUSE * max(usual, 1.0)
    }
    whole = sum(counted.values())
    shares = {"waiting for data": _sum_of_means(metrics, "time/data", counted)}
    saves = metrics.series.get("time/checkpoint", Series())
    shares["saving checkpoints"] = sum(
        seconds for i, seconds in zip(saves.iterations, saves.values, strict=True) if i in counted
    )
    for name in metrics.series:
        if name.startswith(_CALLBACK):
            label = f"callback {name.removeprefix(_CALLBACK)}"
            shares[label] = _sum_of_means(metrics, name, counted)
    small = sum(seconds for seconds in shares.values() if seconds < _SHOWN * whole)
    listed = {name: s for name, s in shares.items() if s >= _SHOWN * whole and s > 0}
    training = max(0.0, whole - sum(listed.values()) - small)
    return [
        TimeShare(name="training", seconds=training),
        *(
            TimeShare(name=name, seconds=seconds)
            for name, seconds in sorted(listed.items(), key=lambda item: -item[1])
        ),
        *([TimeShare(name="other callbacks", seconds=small)] if small > 0 else []),
    ]


def _sum_of_means(metrics: MetricsReader, name: str, counted: dict[int, float]) -> float:
    """Multiply each mean over the iterations since the log point before with their number."""
    series, total = metrics.series.get(name, Series()), 0.0
    position = {iteration: n for n, iteration in enumerate(metrics.times.iterations)}
    for iteration, mean in zip(series.iterations, series.values, strict=True):
        n = position.get(iteration)
        if iteration in counted and n:
            total += mean * (iteration - metrics.times.iterations[n - 1])
    return total
