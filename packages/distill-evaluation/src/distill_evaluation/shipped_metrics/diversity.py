"""How different clips of one prompt are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import frozen
from distill_protocols import Metric, MetricParts, Samples
from torch import Tensor

from distill_evaluation.metrics import group_variances


@frozen
class Diversity(Metric):
    """The unbiased variance of each pixel among the clips of a prompt, averaged over pixels and
    prompts (``within_group_variance``)."""

    def measure(self, samples: Samples) -> dict[str, Tensor]:
        # Groups by place and not by prompt: the last prompt may be there twice, to fill up a rank,
        # and the copies would otherwise count as one group of twice the clips.
        prompts, each = samples.clips.shape[:2]
        groups = torch.arange(prompts).repeat_interleave(each)
        return {"variance": group_variances(samples.all_clips, groups)}

    def combine(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        return {"variance": float(rows["variance"].mean())}


def build(parts: MetricParts) -> Metric:
    """Make the metric."""
    return Diversity()
