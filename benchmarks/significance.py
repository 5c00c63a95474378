"""Whether one model ranks better than another, by plain arrays: paired over users.

Users are what is drawn again; that another seed trains another model is not in it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000
AT_A_TIME = 2**21  # users drawn at a time in the bootstrap: 16 MB


def comparisons(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, Any]]:
    """FAME's figures against others', the users of all pairs drawn again together.

    Args:
      pairs: of FAME's value_U and another's, float; U is the same in all of them.

    Returns:
      For each pair users, the means fame and other, their difference, low and high of its 95 %
      interval by the bootstrap, and p of the signed-rank test.
    """
    difference_UC = np.stack([fame_U - other_U for fame_U, other_U in pairs], axis=1)
    low_C, high_C = bootstrap(difference_UC)
    return [
        {
            'users': len(difference_UC),
            'fame': float(fame_U.mean()),
            'other': float(other_U.mean()),
            'difference': float(difference_U.mean()),
            'low': float(low),
            'high': float(high),
            'p': signed_rank(difference_U),
        }
        for (fame_U, other_U), difference_U, low, high in zip(pairs, difference_UC.T, low_C, high_C)
    ]


def mean_gain(ranks: Sequence[np.ndarray], k: int) -> np.ndarray:
    """NDCG@k of each user, float64 [U]: the mean over several rank_U, one of each seed."""
    return np.mean([gain(rank_U, k) for rank_U in ranks], axis=0)


def gain(rank_U: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k of each user: 1 / log2(1 + rank) within the cut-off."""
    return np.where(rank_U <= k, 1 / np.log2(1 + rank_U.astype(np.float64)), 0)


def bootstrap(
    value_UC: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % percentile interval of the mean over users, users drawn again with replacement.

    All columns see the same draws, so that a draw is paid for once.

    Args:
      value_UC: float, C values of each of U users.
      resamples: R.
      seed: of the draws.

    Returns:
      low_C and high_C.
    """
    users = len(value_UC)
    rng = np.random.default_rng(seed)
    mean_RC = []
    for first in range(0, resamples, max(1, AT_A_TIME // users)):
        rows = min(max(1, AT_A_TIME // users), resamples - first)
        drawn_RU = rng.integers(0, users, (rows, users)) + users * np.arange(rows)[:, None]
        times_RU = np.bincount(drawn_RU.ravel(), minlength=rows * users).reshape(rows, users)
        mean_RC.append(times_RU.astype(np.float64) @ value_UC / users)
    low_C, high_C = np.percentile(np.concatenate(mean_RC), [2.5, 97.5], axis=0)
    return low_C, high_C


def signed_rank(difference_U: np.ndarray) -> float:
    """Wilcoxon's signed-rank test, two-sided: p; users without a difference are left out."""
    from scipy import stats  # a second to import

    # Means over seeds that are equal but for rounding are no difference.
    difference_U = difference_U.round(12)
    return float(stats.wilcoxon(difference_U).pvalue) if difference_U.any() else 1.0
