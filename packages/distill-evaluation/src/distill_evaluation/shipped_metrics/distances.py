"""Distances to real clips that need no network, and that nobody tuned by."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from attrs import frozen
from distill_protocols import DataError, Metric, MetricParts, Samples
from torch import Tensor

from distill_evaluation.distances import DistanceReference


@frozen(eq=False)
class DistancesToRealClips(Metric):
    """Frechet distances of pixels and latents, and the latents' standard deviation
    (``DistanceReference``)."""

    real: DistanceReference

    def measure(self, samples: Samples) -> dict[str, Tensor]:
        features = self.real.features(samples.all_clips, samples.all_latents)
        return {"features": samples.by_prompt(features)}

    def combine(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        return attrs.asdict(self.real.distances(rows["features"].flatten(0, 1)))


def build(parts: MetricParts) -> Metric:
    """Make the metric.

    Raises:
        DataError: the real clips are too few.
    """
    assert parts.real is not None, "its plugin states that it needs them"
    try:
        return DistancesToRealClips(
            DistanceReference.of_clips(parts.real.clips, parts.real.latents)
        )
    except ValueError as error:
        raise DataError(f"{parts.inputs.real_latents}: {error}") from error
