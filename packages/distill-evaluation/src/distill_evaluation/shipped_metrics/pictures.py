"""Sharpness, contrast and colour of an entry's clips."""

from distill_protocols import Metric, MetricParts

from distill_evaluation.measures import clipped_share, contrast, saturation, sharpness
from distill_evaluation.shipped_metrics.clip_numbers import ClipNumbers


def build(parts: MetricParts) -> Metric:
    """Make the metric."""
    return ClipNumbers(
        of_clips={
            "sharpness": sharpness,
            "contrast": contrast,
            "saturation": saturation,
            "clipped": clipped_share,
        }
    )
