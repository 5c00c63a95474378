"""Gains, intervals and tests, against loops, the judge and the normal interval."""

import numpy as np
import pytest
from scipy import stats

from benchmarks import significance
from fame_jax import evaluate


def test_gains_are_those_of_the_metrics():
    rank_U = np.arange(1, 60, dtype=np.int32)
    for k in evaluate.CUTOFFS:
        mean = significance.gain(rank_U, k).mean()
        assert mean == pytest.approx(evaluate.metrics(rank_U)[f'ndcg@{k}'])


def test_the_mean_gain_is_each_users_over_the_seeds():
    ranks = [np.array([1, 3, 11]), np.array([2, 30, 10])]
    found = significance.mean_gain(ranks, 10)
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
    monkeypatch.setattr(significance, 'AT_A_TIME', 7)
    assert np.concatenate(significance.bootstrap(value_UC[:5], 300)) == pytest.approx(
        np.percentile(_slow_means(value_UC[:5], 300), [2.5, 97.5], axis=0).ravel()
    )


def _slow_means(value_UC, resamples):
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(value_UC), (1, len(value_UC)))[0] for _ in range(resamples)]
    return [[np.mean([value_UC[u, c] for u in draw]) for c in (0, 1)] for draw in draws]


def test_pairs_are_compared_each_by_itself():
    rng = np.random.default_rng(2)
    pairs = [(rng.random(40) + shift, rng.random(40)) for shift in (0.5, 0)]
    found = significance.comparisons(pairs)
    for (fame_U, other_U), test in zip(pairs, found):
        difference_U = [a - b for a, b in zip(fame_U, other_U)]
        assert test['users'] == 40
        assert [test['fame'], test['other']] == pytest.approx([sum(fame_U) / 40, sum(other_U) / 40])
        assert test['difference'] == pytest.approx(sum(difference_U) / 40)
        assert test['low'] < test['difference'] < test['high']
        assert test['p'] == pytest.approx(stats.wilcoxon(difference_U).pvalue)
        assert significance.comparisons([(fame_U, other_U)]) == [pytest.approx(test)]
    assert found[0]['low'] > 0 and found[0]['p'] < 0.001
    assert found[1]['low'] < 0 < found[1]['high'] and found[1]['p'] > 0.05


def test_what_is_equal_but_for_rounding_does_not_differ():
    third_U = np.full(5, 0.1 + 0.2)
    (found,) = significance.comparisons([(third_U, np.full(5, 0.3))])
    assert third_U[0] != 0.3 and found['p'] == 1
