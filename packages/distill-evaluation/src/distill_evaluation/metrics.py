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


@attrs.frozen
class Whitening:
    """Projects features on the `K` directions in which a reference varies most, each scaled to
    variance 1 of the reference. float64.
    """

    mean: Tensor
    directions: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """Project `features [N, D]` to `[N, K]`."""
        return torch.cat(
            [(rows.double() - self.mean) @ self.directions for rows in features.split(64)]
        )


def fit_whitening(reference: Tensor, components: int) -> Whitening:
    """Fit principal components of `reference [N, D]`, which may have far more features than
    samples.

    The eigenvectors of the covariance `X^T X / (N - 1)` are `X^T u / s`, for the eigenvectors `u`
    and values `s^2` of the `N x N` matrix `X X^T`; so nothing of `D x D` is made.

    ValueError if there are not so many directions of variance.
    """
    mean = torch.zeros(reference.shape[1], dtype=torch.float64)
    for rows in reference.split(64):
        mean += rows.double().sum(0)
    mean /= len(reference)
    gram = torch.zeros(len(reference), len(reference), dtype=torch.float64)
    for columns in torch.arange(reference.shape[1]).split(4096):
        centred = reference[:, columns].double() - mean[columns]
        gram += centred @ centred.T
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[-components:], vectors[:, -components:]
    if len(values) < components or not values[0] > 1e-10 * values[-1]:
        raise ValueError(
            f"{len(reference)} reference samples of {reference.shape[1]} features vary in fewer "
            f"than {components} directions, so that many components cannot be whitened; give more "
            "samples."
        )
    # X^T u / s has length 1; over s / sqrt(N - 1), the standard deviation along it.
    scaled = vectors * (len(reference) - 1) ** 0.5 / values
    directions = torch.zeros(reference.shape[1], components, dtype=torch.float64)
    for rows, weights in zip(reference.split(64), scaled.split(64), strict=True):
        directions += (rows.double() - mean).T @ weights
    return Whitening(mean, directions)


def motion_features(clips: Tensor) -> Tensor:
    """Flatten `clips [N, C, F, H, W]` and the differences of their frames to `[N, D]`.

    Of the pixels alone a still clip and a moving one may have the same Gaussian.
    """
    return torch.cat([clips.flatten(1), clips.diff(dim=2).flatten(1)], dim=1)


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
