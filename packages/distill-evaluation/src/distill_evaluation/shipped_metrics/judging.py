"""The judge of a report, loaded once for all metrics that ask it."""

from __future__ import annotations

from distill_protocols import MetricParts, Samples
from torch import Tensor

from distill_evaluation.judge import Judge


def judge_of(parts: MetricParts) -> Judge:
    """Return the report's judge.

    Raises:
        WeightsError: its folder is damaged.
    """
    folder = parts.inputs.judge
    assert folder is not None, "the plugin states that it needs one"
    return parts.shared.get(("judge", folder), lambda: Judge.load(folder))


def judged_features(judge: Judge, samples: Samples) -> Tensor:
    """Return the judge's features [P K, D] of all clips, computed once for all metrics."""
    return samples.shared.get(("features", id(judge)), lambda: judge.features(samples.all_clips))
