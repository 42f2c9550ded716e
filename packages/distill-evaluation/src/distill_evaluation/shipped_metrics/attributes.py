"""How often a judge sees in a clip what its prompt asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import frozen
from distill_protocols import Metric, MetricParts, Samples
from torch import Tensor

from distill_evaluation.judge import Judge
from distill_evaluation.shipped_metrics.judging import judge_of, judged_features


@frozen(eq=False)
class AttributeAccuracy(Metric):
    """The share of clips in which the judge's answer is the class that the prompt names."""

    judge: Judge
    expected: Mapping[str, Tensor]

    def measure(self, samples: Samples) -> dict[str, Tensor]:
        answers = self.judge.classify_features(judged_features(self.judge, samples))
        rows = torch.tensor(samples.rows)
        return {
            attribute: samples.by_prompt(answer) == self.expected[attribute][rows, None]
            for attribute, answer in answers.items()
        }

    def combine(self, rows: Mapping[str, Tensor]) -> dict[str, float]:
        return {attribute: float(right.double().mean()) for attribute, right in rows.items()}


def build(parts: MetricParts) -> Metric:
    """Make the metric.

    Raises:
        WeightsError: the judge's folder is damaged.
        PromptLabelError: a prompt names no class of an attribute, or two.
    """
    judge = judge_of(parts)
    return AttributeAccuracy(judge, judge.expected(list(parts.inputs.prompts)))
