"""Reports on a student: Frechet distance, attribute accuracy, contact sheet.

Nothing here imports torch until one of the names is used: plugin descriptors are read before torch
is.
"""

from typing import TYPE_CHECKING

from distill_protocols.lazy import lazy_exports

if TYPE_CHECKING:
    from distill_evaluation.judge import ClipJudge, Judge, JudgeConfig
    from distill_evaluation.labels import PromptLabelError, label_prompts, labels_of
    from distill_evaluation.metrics import (
        FeatureStatistics,
        attribute_accuracy,
        feature_statistics,
        frechet_distance,
        frechet_distance_of_features,
        within_group_variance,
    )

_LAZY = {
    "ClipJudge": "judge",
    "FeatureStatistics": "metrics",
    "Judge": "judge",
    "JudgeConfig": "judge",
    "PromptLabelError": "labels",
    "attribute_accuracy": "metrics",
    "feature_statistics": "metrics",
    "frechet_distance": "metrics",
    "frechet_distance_of_features": "metrics",
    "label_prompts": "labels",
    "labels_of": "labels",
    "within_group_variance": "metrics",
}

__all__ = [
    "ClipJudge",
    "FeatureStatistics",
    "Judge",
    "JudgeConfig",
    "PromptLabelError",
    "attribute_accuracy",
    "feature_statistics",
    "frechet_distance",
    "frechet_distance_of_features",
    "label_prompts",
    "labels_of",
    "within_group_variance",
]

__getattr__ = lazy_exports(__name__, _LAZY)
