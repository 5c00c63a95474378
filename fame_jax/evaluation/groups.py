"""Statistics of a report beyond the metrics of all users, from plain arrays.

Groups of users and their metrics; how much each head and expert is used; which users to show as
examples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fame_jax.evaluation.metrics import metrics

QUANTILES = 4  # groups by a count
BINS = 30  # of a histogram of shares
DEAD = 0.1  # a head or expert below this part of an equal share is unused


def by_quantile(count_U: np.ndarray, parts: int = QUANTILES) -> list[tuple[str, np.ndarray]]:
    """Groups of users with about equal sizes by a count; equal counts are in one group.

    Args:
      count_U: int [U], not empty.
      parts: number of groups at most.

    Returns:
      For each group its name, such as '5 to 7', and its members, bool [U].
    """
    shares = np.arange(1, parts + 1) / parts
    highs = np.unique(np.quantile(count_U, shares, method='inverted_cdf'))
    lows = [count_U.min(), *(highs[:-1] + 1)]
    return [
        (
            f'{low:,}' if low == high else f'{low:,} to {high:,}',
            (count_U >= low) & (count_U <= high),
        )
        for low, high in zip(lows, highs)
    ]


def by_popularity(count_U: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """As `by_quantile`, with users of cold targets, which are not in the training data, apart.

    Args:
      count_U: int [U], how often each user's target occurs in the training data.
    """
    groups = [('never (cold)', count_U == 0)] if (count_U == 0).any() else []
    is_warm_U = count_U > 0
    for name, members in by_quantile(count_U[is_warm_U]) if is_warm_U.any() else ():
        is_member_U = np.zeros(len(count_U), bool)
        is_member_U[is_warm_U] = members
        groups.append((name, is_member_U))
    return groups


def group_metrics(
    groups: Sequence[tuple[str, np.ndarray]], ranks: Mapping[str, Mapping[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """The metrics of each group.

    Args:
      groups: the name and the members, bool [U], of each.
      ranks: stage -> protocol -> int [U]; or of several seeds int [S, U], whose mean counts.

    Returns:
      A dict for each group: 'name'; 'users', their number; 'figures', stage -> protocol -> metrics,
      together with 'error', the standard error of NDCG@10 over users.
    """
    return [
        {
            'name': name,
            'users': int(is_member_U.sum()),
            'figures': {
                stage: {
                    protocol: _metrics_and_error(rank_U[..., is_member_U])
                    for protocol, rank_U in of_stage.items()
                }
                for stage, of_stage in ranks.items()
            },
        }
        for name, is_member_U in groups
    ]


def _metrics_and_error(rank_U: np.ndarray) -> dict[str, float]:
    gain_U = np.atleast_2d(np.where(rank_U <= 10, 1 / np.log2(1 + rank_U), 0)).mean(axis=0)
    return metrics(rank_U) | {'error': float(gain_U.std() / np.sqrt(len(gain_U)))}


def usage(share_UH: np.ndarray, router_UHN: np.ndarray) -> dict[str, Any]:
    """How much each head, and each expert of a head, is used.

    Args:
      share_UH: float, the gate's weights of the heads, 1 in sum.
      router_UHN: float, the router's weights of each head's experts, 1 in sum.

    Returns:
      A dict:
        users    U
        edges    [BINS + 1], of the histograms
        heads    [{share, top, histogram [BINS], entropy, entropy_of_mean, experts [{share, top}]}];
                 share is the mean weight, top the share of users for whom the weight is the
                 largest; the entropies are those of the head's router
        entropy, entropy_of_mean   of the gate
        limits   the mean weights of a head and an expert below which it is dead
        dead_heads [h], dead_experts [[h, n]]   counted from 0
      'entropy' is the mean over users of the weights' entropy, 'entropy_of_mean' the entropy of the
      mean weights; both are divided by their maximum, and None for a single head or expert.
    """
    heads, experts = router_UHN.shape[1:]
    limits = [DEAD / heads, DEAD / experts]
    mean_H, mean_HN = share_UH.mean(0), router_UHN.mean(0)
    top_H, top_HN = _share_of_largest(share_UH), _share_of_largest(router_UHN)
    low, high = np.floor(20 * share_UH.min()) / 20, np.ceil(20 * share_UH.max()) / 20
    edges = np.linspace(max(low, 0), min(max(high, low + 0.05), 1), BINS + 1)
    clipped_UH = share_UH.clip(edges[0], edges[-1])
    return {
        'users': len(share_UH),
        'edges': edges.tolist(),
        'heads': [
            {
                'share': float(mean_H[h]),
                'top': float(top_H[h]),
                'histogram': np.histogram(clipped_UH[:, h], edges)[0].tolist(),
                'experts': [
                    {'share': float(mean_HN[h, n]), 'top': float(top_HN[h, n])}
                    for n in range(experts)
                ],
                **_entropies(router_UHN[:, h]),
            }
            for h in range(heads)
        ],
        **_entropies(share_UH),
        'limits': limits,
        'dead_heads': np.flatnonzero(mean_H < limits[0]).tolist(),
        'dead_experts': np.argwhere(mean_HN < limits[1]).tolist(),
    }


def _share_of_largest(share_UX: np.ndarray) -> np.ndarray:
    """The share of users for whom each entry of the last axis is the largest."""
    return np.eye(share_UX.shape[-1])[share_UX.argmax(-1)].mean(0)


def _entropies(share_UX: np.ndarray) -> dict[str, float | None]:
    if share_UX.shape[1] == 1:
        return {'entropy': None, 'entropy_of_mean': None}
    mean, of_mean = evenness(share_UX).mean(), evenness(share_UX.mean(0))
    return {'entropy': float(mean), 'entropy_of_mean': float(of_mean)}


def evenness(share_BX: np.ndarray) -> np.ndarray:
    """The entropy of shares along the last axis, divided by its maximum; 0 for a single share."""
    log = np.log(np.where(share_BX > 0, share_BX, 1))
    return -np.sum(share_BX * log, axis=-1) / np.log(max(share_BX.shape[-1], 2))


def example_users(
    rank_U: np.ndarray,
    length_U: np.ndarray,
    last_rank: int,
    share_UH: np.ndarray | None = None,
    variety_U: np.ndarray | None = None,
) -> list[tuple[str, int]]:
    """Users to show as examples, chosen by fixed rules; among equal users the first.

    Args:
      rank_U: int, masked ranks of the targets.
      length_U: int, lengths of the histories.
      last_rank: V; a target with this rank may be in the history, so the user is not an example of
        a miss.
      share_UH: the gate's weights, for a model with heads.
      variety_U: int, number of different items in the lists of all heads.

    Returns:
      The rule in words and the user's index; no user twice.
    """
    user_U = np.arange(len(rank_U))
    is_hit_U, is_miss_U = rank_U <= 3, (rank_U > 10) & (rank_U < last_rank)
    is_any_U = np.ones(len(rank_U), bool)
    # Each rule: its words, the users that it allows, and a key that is smallest for the user.
    rules = []
    if share_UH is None or share_UH.shape[1] < 2:
        rules.append(('the target is at rank 1 to 3: the first such user', is_hit_U, user_U))
    else:
        even_U = evenness(share_UH)
        rule = 'the target is at rank 1 to 3, and the gate prefers one head most clearly'
        rules.append((rule, is_hit_U, even_U))
        rule = "the heads' lists have the fewest items in common, and the gate is the most even"
        rules.append((rule, is_any_U, -2.0 * variety_U - even_U))
    rules.append(('a miss: the target has the lowest rank of all', is_miss_U, -rank_U))
    rules.append(('the longest history', is_any_U, -length_U))
    chosen: list[tuple[str, int]] = []
    for rule, is_allowed_U, key_U in rules:
        allowed = np.flatnonzero(is_allowed_U & ~np.isin(user_U, [user for _, user in chosen]))
        if len(allowed):
            chosen.append((rule, int(allowed[np.argmin(key_U[allowed])])))
    return chosen
