"""The metrics against closed forms."""

import numpy as np
import pytest
import torch
from distill_evaluation import (
    FeatureStatistics,
    attribute_accuracy,
    feature_statistics,
    frechet_distance,
    frechet_distance_of_features,
    within_group_variance,
)
from distill_evaluation.distances import DistanceReference
from distill_evaluation.metrics import fit_whitening, motion_features
from hypothesis import given, settings
from hypothesis import strategies as st

seeds = st.integers(0, 10_000)
sizes = st.integers(1, 6)


def random_statistics(size: int, seed: int) -> FeatureStatistics:
    generator = torch.Generator().manual_seed(seed)
    return feature_statistics(
        torch.randn(size + 3, size, generator=generator)
        @ torch.randn(size, size, generator=generator)
    )


@given(sizes, seeds)
def test_distance_to_itself_is_zero(size: int, seed: int) -> None:
    statistics = random_statistics(size, seed)
    assert frechet_distance(statistics, statistics) == pytest.approx(
        0, abs=1e-5 * float(1 + statistics.covariance.trace())
    )


@given(sizes, seeds)
def test_moving_the_mean_by_d_costs_d_squared(size: int, seed: int) -> None:
    statistics = random_statistics(size, seed)
    shift = torch.randn(size, generator=torch.Generator().manual_seed(seed + 1)).double() * 3
    moved = FeatureStatistics(statistics.mean + shift, statistics.covariance, statistics.count)
    expected = float(shift.square().sum())
    assert frechet_distance(statistics, moved) == pytest.approx(
        expected, rel=1e-4, abs=1e-4 * float(1 + statistics.covariance.trace())
    )


@given(sizes, seeds, seeds)
def test_it_is_symmetric(size: int, one: int, other: int) -> None:
    first, second = random_statistics(size, one), random_statistics(size, other)
    assert frechet_distance(first, second) == pytest.approx(
        frechet_distance(second, first), rel=1e-5, abs=1e-5
    )


@given(st.lists(st.tuples(st.floats(0, 4), st.floats(0, 4)), min_size=1, max_size=5))
def test_diagonal_covariances_have_a_closed_form(deviations: list[tuple[float, float]]) -> None:
    pairs = torch.tensor(deviations, dtype=torch.float64)
    zero = torch.zeros(len(deviations), dtype=torch.float64)
    first, second = (FeatureStatistics(zero, torch.diag(column.square()), 9) for column in pairs.T)
    expected = float((pairs[:, 0] - pairs[:, 1]).square().sum())
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=20)
@given(seeds)
def test_rotating_both_feature_sets_changes_no_distance(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        torch.randn(20, 4, generator=generator),
        torch.randn(30, 4, generator=generator) * 2 + 1,
    )
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    straight = frechet_distance_of_features(first, second)
    assert frechet_distance_of_features(first @ rotation, second @ rotation) == pytest.approx(
        straight, rel=1e-3
    )


def test_fewer_samples_than_features_is_no_problem() -> None:
    features = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert frechet_distance_of_features(features, features + 2) == pytest.approx(64 * 4, rel=1e-4)


def test_statistics_match_torch_cov() -> None:
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(feature_statistics(features).covariance, features.double().T.cov())


@pytest.mark.parametrize("shape", [(1, 4), (4,), (2, 3, 4)])
def test_features_must_be_a_table_of_two_rows(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"N >= 2"):
        feature_statistics(torch.zeros(shape))


def test_features_of_two_judges_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="one judge"):
        frechet_distance(random_statistics(3, 0), random_statistics(4, 0))


def test_accuracy_counts_equal_answers() -> None:
    assert attribute_accuracy(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 0, 4])) == 0.75
    with pytest.raises(ValueError, match="one answer per sample"):
        attribute_accuracy(torch.tensor([1, 2]), torch.tensor([1]))


def test_variance_is_within_groups_not_between_them() -> None:
    values = torch.tensor([[0.0], [2.0], [100.0], [102.0]])
    assert within_group_variance(values, torch.tensor([0, 0, 1, 1])) == pytest.approx(2.0)


def test_variance_skips_groups_of_one_and_collapse_is_zero() -> None:
    values = torch.tensor([[3.0, 1.0], [3.0, 1.0], [50.0, 7.0]])
    assert within_group_variance(values, torch.tensor([4, 4, 9])) == 0
    with pytest.raises(ValueError, match="two samples"):
        within_group_variance(values, torch.tensor([1, 2, 3]))


# -- distances that nobody tuned by ---------------------------------------------------------------


def by_numpy(reference: np.ndarray, samples: np.ndarray, components: int) -> float:
    """Frechet distance in whitened components, by other decompositions than ours: numpy's SVD of
    the data, and eigenvalues of the product of covariances, which is not symmetric."""
    mean = reference.mean(0)
    _, values, directions = np.linalg.svd(reference - mean, full_matrices=False)
    scale = directions[:components].T / values[:components] * np.sqrt(len(reference) - 1)
    first, second = ((x - mean) @ scale for x in (reference, samples))
    assert np.allclose(np.cov(first.T), np.eye(components))
    one, other = np.cov(first.T), np.cov(second.T)
    cross = np.sqrt(np.linalg.eigvals(one @ other).real.clip(0)).sum()
    shift = ((first.mean(0) - second.mean(0)) ** 2).sum()
    return float(shift + np.trace(one) + np.trace(other) - 2 * cross)


def smooth(count: int, *shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Return clips whose neighbouring pixels are correlated, as in real ones."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *shape, generator=generator)
    return scale * (noise + noise.cumsum(-1) + noise.cumsum(2)) + 0.3


@pytest.mark.parametrize(("count", "size"), [(150, 300), (300, 90)])
def test_whitened_distances_against_numpy(count: int, size: int) -> None:
    reference = smooth(count, 1, 2, size // 2, seed=0).flatten(1)
    samples = smooth(70, 1, 2, size // 2, seed=1, scale=1.2).flatten(1)
    whitening = fit_whitening(reference, 40)
    ours = frechet_distance_of_features(whitening.apply(reference), whitening.apply(samples))
    theirs = by_numpy(reference.double().numpy(), samples.double().numpy(), 40)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert ours > 1


def test_too_few_clips_for_the_components_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 40 directions"):
        fit_whitening(torch.randn(40, 300), 40)  # 40 samples vary in 39
    with pytest.raises(ValueError, match="fewer than 40 directions"):
        fit_whitening(torch.randn(80, 30), 40)


def test_distances_of_clips_against_numpy() -> None:
    clips, latents = smooth(160, 3, 4, 6, 6, seed=0), smooth(160, 4, 2, 4, 4, seed=2)
    fakes, codes = smooth(90, 3, 4, 6, 6, seed=3), smooth(90, 4, 2, 4, 4, seed=4, scale=1.25)
    reference = DistanceReference.of_clips(clips, latents)
    distances = reference.distances(reference.features(fakes, codes))

    def moving(x: torch.Tensor) -> np.ndarray:
        frames = x.double().numpy()
        steps = frames[:, :, 1:] - frames[:, :, :-1]
        return np.concatenate([frames.reshape(len(x), -1), steps.reshape(len(x), -1)], axis=1)

    assert np.allclose(motion_features(fakes).numpy(), moving(fakes), atol=1e-6)
    assert distances.pixels == pytest.approx(by_numpy(moving(clips), moving(fakes), 48), rel=1e-6)
    flat = [x.double().flatten(1).numpy() for x in (latents, codes)]
    assert distances.latents == pytest.approx(by_numpy(flat[0], flat[1], 64), rel=1e-6)
    assert distances.latent_std == pytest.approx(flat[1].std() / flat[0].std(), rel=1e-4)
    assert distances.latent_std == pytest.approx(1.25, abs=0.1)
    same = reference.distances(reference.features(clips, latents))
    assert same.pixels == pytest.approx(0, abs=1e-6)
    assert same.latents == pytest.approx(0, abs=1e-6)
    assert same.latent_std == pytest.approx(1, abs=1e-4)
