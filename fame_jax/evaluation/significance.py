"""Whether one model ranks better than another: tests paired over users, on plain arrays.

Users are resampled, training seeds are not: that another seed trains another model shows in the
standard deviation over seeds, and not here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
DRAWS = 2**21  # users drawn at a time in the bootstrap, 16 MB


class PairedTest(NamedTuple):
    """The metric of one model compared with that of another on the same users."""

    users: int
    first: float  # mean over users
    second: float
    difference: float  # first - second
    low: float  # 95 % interval of the difference, by the bootstrap
    high: float
    p: float  # of Wilcoxon's signed-rank test, two-sided


def paired_tests(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[PairedTest]:
    """Tests of several pairs; each resample draws the same users for all of them.

    Args:
      pairs: of first_U and second_U, float [U], a metric by user; U is the same in all pairs.
    """
    if not pairs:
        return []
    difference_UC = np.stack([first_U - second_U for first_U, second_U in pairs], axis=1)
    low_C, high_C = bootstrap(difference_UC)
    return [
        PairedTest(
            users=len(first_U),
            first=float(first_U.mean()),
            second=float(second_U.mean()),
            difference=float(difference_U.mean()),
            low=float(low),
            high=float(high),
            p=wilcoxon(difference_U),
        )
        for (first_U, second_U), difference_U, low, high in zip(
            pairs, difference_UC.T, low_C, high_C
        )
    ]


class PairedInterval(NamedTuple):
    """The mean of two metrics of the same users, and the interval of their difference."""

    first: float
    second: float
    difference: float  # first - second
    low: float  # 95 % interval of the difference, by Student's t of the paired differences
    high: float

    def __str__(self) -> str:
        """The difference and its interval, such as '+.0073, 95 % interval over users ...'."""
        difference, low, high = (
            f'{value:+.4f}'.replace('0.', '.', 1)
            for value in (self.difference, self.low, self.high)
        )
        return f'{difference}, 95 % interval over users {low} to {high}'


def paired_interval(first_U: np.ndarray, second_U: np.ndarray) -> PairedInterval:
    """The interval of a difference, without resampling, which takes minutes for many users.

    Args:
      first_U, second_U: float [U], a metric by user; for one user the interval is infinite.
    """
    from scipy import special  # the quantile of Student's t

    difference_U, users = first_U - second_U, len(first_U)
    mean, half = float(difference_U.mean()), math.inf
    if users > 1:
        error = difference_U.std(ddof=1) / math.sqrt(users)
        half = float(special.stdtrit(users - 1, 0.975) * error)
    means = float(first_U.mean()), float(second_U.mean())
    return PairedInterval(*means, mean, mean - half, mean + half)


def mean_ndcg(ranks: Sequence[np.ndarray], k: int) -> np.ndarray:
    """NDCG@k of each user, float64 [U]: the mean over several rank_U, one of each seed."""
    return np.mean([ndcg(rank_U, k) for rank_U in ranks], axis=0)


def ndcg(rank_U: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k of each user, float64 [U], of the rank of one target: 1 / log2(1 + rank) up to k."""
    return np.where(rank_U <= k, 1 / np.log2(1 + rank_U.astype(np.float64)), 0)


def bootstrap(
    value_UC: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile interval of the mean over users, drawn with replacement.

    Args:
      value_UC: float [U, C], C values of each user; all columns see the same draws.
      resamples: the number of draws of U users.
      seed: of the draws.

    Returns:
      low_C and high_C, float64 [C].
    """
    users = len(value_UC)
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWS // users)
    mean_RC = []
    for first in range(0, resamples, at_once):
        rows = min(at_once, resamples - first)
        drawn_RU = rng.integers(0, users, (rows, users)) + users * np.arange(rows)[:, None]
        count_RU = np.bincount(drawn_RU.ravel(), minlength=rows * users).reshape(rows, users)
        mean_RC.append(count_RU.astype(np.float64) @ value_UC / users)
    low_C, high_C = np.percentile(np.concatenate(mean_RC), [2.5, 97.5], axis=0)
    return low_C, high_C


def wilcoxon(difference_U: np.ndarray) -> float:
    """The two-sided p-value of Wilcoxon's signed-rank test; equal users are left out."""
    from scipy import stats  # takes a second to import

    # Means over seeds that are equal but for rounding are no difference.
    difference_U = difference_U.round(12)
    return float(stats.wilcoxon(difference_U).pvalue) if difference_U.any() else 1.0
