"""The metrics against closed forms."""

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
def test_rotating_both_changes_nothing(seed: int) -> None:
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


def test_two_judges_do_not_mix() -> None:
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
