"""NDCG by user, intervals and tests, against loops, our metrics and the normal interval."""

import numpy as np
import pytest
from scipy import stats

from fame_jax.evaluation import metrics, significance


def test_the_mean_over_users_is_the_metric():
    rank_U = np.arange(1, 60, dtype=np.int32)
    for k in metrics.CUTOFFS:
        mean = significance.ndcg(rank_U, k).mean()
        assert mean == pytest.approx(metrics.metrics(rank_U)[f'ndcg@{k}'])


def test_each_users_ndcg_is_averaged_over_seeds():
    ranks = [np.array([1, 3, 11]), np.array([2, 30, 10])]
    found = significance.mean_ndcg(ranks, 10)
    log = np.log2
    assert found == pytest.approx([(1 + 1 / log(3)) / 2, 1 / log(4) / 2, 1 / log(11) / 2])


def test_the_bootstrap_is_that_of_a_mean(monkeypatch):
    """Against the normal interval, the same in small chunks, and for each column its own."""
    value_UC = np.random.default_rng(1).normal([0, 5], [1, 0], (500, 2))
    low_C, high_C = significance.bootstrap(value_UC)
    error = 1.96 * value_UC[:, 0].std() / 500**0.5
    assert [low_C[0], high_C[0]] == pytest.approx(
        [value_UC[:, 0].mean() - error, value_UC[:, 0].mean() + error], abs=0.01
    )
    assert [low_C[1], high_C[1]] == pytest.approx([5, 5])
    monkeypatch.setattr(significance, 'DRAWS', 7)
    assert np.concatenate(significance.bootstrap(value_UC[:5], 300)) == pytest.approx(
        np.percentile(_slow_means(value_UC[:5], 300), [2.5, 97.5], axis=0).ravel()
    )


def _slow_means(value_UC, resamples):
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(value_UC), (1, len(value_UC)))[0] for _ in range(resamples)]
    return [[np.mean([value_UC[u, c] for u in draw]) for c in (0, 1)] for draw in draws]


def test_pairs_are_tested_each_by_itself():
    rng = np.random.default_rng(2)
    pairs = [(rng.random(40) + shift, rng.random(40)) for shift in (0.5, 0)]
    found = significance.paired_tests(pairs)
    for (first_U, second_U), test in zip(pairs, found):
        difference_U = [a - b for a, b in zip(first_U, second_U)]
        assert test.users == 40
        assert [test.first, test.second] == pytest.approx([sum(first_U) / 40, sum(second_U) / 40])
        assert test.difference == pytest.approx(sum(difference_U) / 40)
        assert test.low < test.difference < test.high
        assert test.p == pytest.approx(stats.wilcoxon(difference_U).pvalue)
        assert significance.paired_tests([(first_U, second_U)])[0] == pytest.approx(test)
    assert found[0].low > 0 and found[0].p < 0.001
    assert found[1].low < 0 < found[1].high and found[1].p > 0.05
    assert significance.paired_tests([]) == []


def test_values_that_are_equal_but_for_rounding_do_not_differ():
    third_U = np.full(5, 0.1 + 0.2)
    (found,) = significance.paired_tests([(third_U, np.full(5, 0.3))])
    assert third_U[0] != 0.3 and found.p == 1


def test_a_paired_interval_is_that_of_students_t():
    rng = np.random.default_rng(0)
    first_U, second_U = rng.normal(0.3, 1, 30), rng.normal(0, 1, 30)
    found = significance.paired_interval(first_U, second_U)
    test = stats.ttest_rel(first_U, second_U).confidence_interval(0.95)
    assert [found.low, found.high] == pytest.approx([test.low, test.high])
    assert found.difference == pytest.approx(found.first - found.second)
    assert (found.first, found.second) == (first_U.mean(), second_U.mean())


def test_a_paired_interval_is_near_the_bootstrap():
    rng = np.random.default_rng(0)
    first_U, second_U = (significance.ndcg(rng.integers(1, 30, 4000), 10) for _ in range(2))
    (test,) = significance.paired_tests([(first_U, second_U)])
    found = significance.paired_interval(first_U, second_U)
    assert [found.low, found.high] == pytest.approx([test.low, test.high], abs=0.001)


def test_intervals_without_a_difference_and_of_one_user():
    same = significance.paired_interval(np.ones(3), np.full(3, 0.5))
    assert str(same) == '+.5000, 95 % interval over users +.5000 to +.5000'
    assert significance.paired_interval(np.ones(1), np.zeros(1))[2:] == (1, -np.inf, np.inf)
