"""Which checkpoints may go."""

from __future__ import annotations

from collections.abc import Mapping

from distill_checkpoint.config import KeepBestConfig


def superseded(
    metrics: Mapping[int, Mapping[str, float]],
    *,
    keep_last: int,
    keep_every: int | None = None,
    keep_best: KeepBestConfig | None = None,
) -> tuple[int, ...]:
    """Of whole checkpoints: those to delete, the oldest first.

    The newest ``keep_last`` (at least 1) stay, multiples of ``keep_every``, and those that were
    best by a metric; of equals the newer.

    Args:
        metrics: by iteration, what was measured in it.
    """
    best = best_of(metrics, keep_best) if keep_best else ()
    older = sorted(metrics)[:-keep_last]
    return tuple(i for i in older if (keep_every is None or i % keep_every) and i not in best)


def best_of(metrics: Mapping[int, Mapping[str, float]], rule: KeepBestConfig) -> tuple[int, ...]:
    """Iterations that ``rule`` keeps, the best first; one without the metric is no candidate."""
    sign = 1 if rule.mode == "min" else -1
    found = [i for i, measured in metrics.items() if rule.metric in measured]
    return tuple(sorted(found, key=lambda i: (sign * metrics[i][rule.metric], -i))[: rule.count])
