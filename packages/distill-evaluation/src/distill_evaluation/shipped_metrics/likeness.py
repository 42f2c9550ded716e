"""How like the reference's clips of the same prompts and noise an entry's clips are."""

from distill_protocols import Metric, MetricParts

from distill_evaluation.measures import psnr, ssim
from distill_evaluation.shipped_metrics.clip_numbers import ClipNumbers


def build(parts: MetricParts) -> Metric:
    """Make the metric."""
    return ClipNumbers(of_pairs={"psnr": psnr, "ssim": ssim})
