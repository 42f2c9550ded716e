"""Measures of samples, as pure functions of tensors. N samples, D features.

The Frechet distance is that of Heusel et al. 2017 (arXiv 1706.08500, equation 6), on a judge's
features instead of Inception's. It is biased upward by a small N: compare only distances measured
with equal N.
"""

import math

import attrs
import torch
from torch import Tensor


@attrs.frozen
class FeatureStatistics:
    """Gaussian fit of features: `mean [D]`, `covariance [D, D]`, both float64, and how many samples
    it came from.
    """

    mean: Tensor
    covariance: Tensor
    count: int


def feature_statistics(features: Tensor) -> FeatureStatistics:
    """Fit a Gaussian to `features [N, D]`; the covariance is the unbiased one.

    ValueError if it is no matrix or N < 2.
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(
            f"features of shape {tuple(features.shape)}: [N, D] with N >= 2 is needed, because a "
            "covariance needs two samples; "
            "flatten each sample's features to one row, or draw more samples."
        )
    values = features.double()
    mean = values.mean(0)
    centred = values - mean
    return FeatureStatistics(mean, centred.T @ centred / (values.shape[0] - 1), values.shape[0])


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Compute |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), in float64.

    The symmetric product has the eigenvalues of C1 C2, and `eigh` finds them without scipy's
    general matrix square root, whose result may come back complex. Never negative: rounding is
    clamped. ValueError if the feature sizes differ.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"features of size {first.mean.numel()} against {second.mean.numel()}: both must come "
            "from one judge, "
            "because the distance compares them number by number; recompute the reference with "
            "this judge."
        )
    root = _symmetric_root(first.covariance)
    product = root @ second.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    spread = first.covariance.trace() + second.covariance.trace() - 2 * cross
    shift = (first.mean - second.mean).square().sum()
    return max(0.0, float(shift + spread))


def frechet_distance_of_features(first: Tensor, second: Tensor) -> float:
    """Compute `frechet_distance` of two feature tables `[N1, D]`, `[N2, D]`."""
    return frechet_distance(feature_statistics(first), feature_statistics(second))


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def attribute_accuracy(predicted: Tensor, expected: Tensor) -> float:
    """Compute the share of equal entries of two integer tensors `[N]`.

    ValueError if the shapes differ or N is 0.
    """
    if predicted.shape != expected.shape or predicted.numel() == 0:
        raise ValueError(
            f"predicted {tuple(predicted.shape)} against expected {tuple(expected.shape)}: one "
            "answer per sample, and at least one "
            "sample, is needed; classify as many clips as there are prompts."
        )
    return float((predicted == expected).double().mean())


def within_group_variance(values: Tensor, groups: Tensor) -> float:
    """Measure how different samples of one caption are: 0 if each prompt has collapsed to one clip.

    `values [N, ...]` (features or pixels), `groups [N]` integer caption ids. The unbiased variance
    of each element within each group, averaged over elements, then over the groups of two or more.
    ValueError if there is no such group.
    """
    variances = group_variances(values, groups)
    variances = variances[~variances.isnan()]
    if not len(variances):
        raise ValueError(
            f"{len(groups)} samples of {len(groups.unique())} captions: a caption needs two "
            "samples or more, because the variance "
            "within it is asked for; sample each prompt at least twice."
        )
    return float(variances.mean())


def group_variances(values: Tensor, groups: Tensor) -> Tensor:
    """Compute `within_group_variance` of each group alone, in the order of their ids: float64 [G].

    nan for a group of one.
    """
    flat = values.double().flatten(1)
    members = [flat[groups == group] for group in groups.unique()]
    return torch.stack(
        [own.var(dim=0).mean() if len(own) > 1 else flat.new_tensor(math.nan) for own in members]
    )
