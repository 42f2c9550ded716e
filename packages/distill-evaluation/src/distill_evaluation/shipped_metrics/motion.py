"""How much moves in an entry's clips."""

from distill_protocols import Metric, MetricParts

from distill_evaluation.measures import flow_magnitude, frame_difference
from distill_evaluation.shipped_metrics.clip_numbers import ClipNumbers


def build(parts: MetricParts) -> Metric:
    """Make the metric."""
    return ClipNumbers(of_clips={"motion": frame_difference, "flow": flow_magnitude})
