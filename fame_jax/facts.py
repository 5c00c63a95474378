"""What a report tells of a run beyond its metrics, from plain arrays.

Groups of users and their figures; how much each head and expert is used; whom to show as a case.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fame_jax import evaluate

QUANTILES = 4  # groups that a number of users is cut into
BINS = 30  # of a histogram of shares
DEAD = 0.1  # of an equal share: who has less is not used


def by_quantile(value_U: np.ndarray, parts: int = QUANTILES) -> list[tuple[str, np.ndarray]]:
    """Users in groups of about one size by a whole number, equal numbers in one group.

    Args:
      value_U: int [U], not empty.
      parts: groups at the most.

    Returns:
      The name of each group, as '5 to 7', and who is in it, bool [U].
    """
    shares = np.arange(1, parts + 1) / parts
    highs = np.unique(np.quantile(value_U, shares, method='inverted_cdf'))
    lows = [value_U.min(), *(highs[:-1] + 1)]
    return [
        (
            f'{low:,}' if low == high else f'{low:,} to {high:,}',
            (value_U >= low) & (value_U <= high),
        )
        for low, high in zip(lows, highs)
    ]


def by_popularity(seen_U: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """As `by_quantile`, with the users apart whose target training never saw.

    Args:
      seen_U: int [U], how often each user's target occurs in training.
    """
    groups = [('never (cold)', seen_U == 0)] if (seen_U == 0).any() else []
    warm_U = seen_U > 0
    for name, chosen in by_quantile(seen_U[warm_U]) if warm_U.any() else ():
        chosen_U = np.zeros(len(seen_U), bool)
        chosen_U[warm_U] = chosen
        groups.append((name, chosen_U))
    return groups


def judge_groups(
    groups: Sequence[tuple[str, np.ndarray]], ranks: Mapping[str, Mapping[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """The metrics of each group.

    Args:
      groups: name and bool [U] of each.
      ranks: stage -> protocol -> int [U].

    Returns:
      Dicts of name, users, and by stage and protocol: the metrics, and error, the standard error
      of NDCG@10 over users.
    """
    return [
        {
            'name': name,
            'users': int(chosen_U.sum()),
            'figures': {
                stage: {p: _judge(rank_U[chosen_U]) for p, rank_U in of_stage.items()}
                for stage, of_stage in ranks.items()
            },
        }
        for name, chosen_U in groups
    ]


def _judge(rank_U: np.ndarray) -> dict[str, float]:
    gain_U = np.where(rank_U <= 10, 1 / np.log2(1 + rank_U), 0)
    return evaluate.metrics(rank_U) | {'error': float(gain_U.std() / np.sqrt(len(gain_U)))}


def use(share_UH: np.ndarray, router_UHN: np.ndarray) -> dict[str, Any]:
    """How much users use each head and each of its experts.

    Args:
      share_UH: float, the gate's shares of the heads, 1 in all.
      router_UHN: float, the router's weights of a head's experts, 1 in all.

    Returns:
      A dict:
        users    U
        edges    [BINS + 1], of the histograms
        heads    [{share, top, histogram [BINS], entropy, entropy_of_mean, experts [{share, top}]}];
                 share is a mean, top the share of users for whom it is the largest; the entropies
                 are of the head's router
        entropy, entropy_of_mean   of the gate
        limits   the mean shares of a head and an expert below which it is dead
        dead_heads [h], dead_experts [[h, n]]   from 0 on
      An entropy is the mean over users, that of the mean is of the mean shares; both in units of
      their maximum, None where there is one choice only.
    """
    heads, experts = router_UHN.shape[1:]
    limits = [DEAD / heads, DEAD / experts]
    mean_H, mean_HN = share_UH.mean(0), router_UHN.mean(0)
    top_H, top_HN = _how_often_largest(share_UH), _how_often_largest(router_UHN)
    low, high = np.floor(20 * share_UH.min()) / 20, np.ceil(20 * share_UH.max()) / 20
    edges = np.linspace(max(low, 0), min(max(high, low + 0.05), 1), BINS + 1)
    return {
        'users': len(share_UH),
        'edges': edges.tolist(),
        'heads': [
            {
                'share': float(mean_H[h]),
                'top': float(top_H[h]),
                'histogram': np.histogram(share_UH[:, h].clip(edges[0], edges[-1]), edges)[
                    0
                ].tolist(),
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


def _how_often_largest(share_UX: np.ndarray) -> np.ndarray:
    return np.eye(share_UX.shape[-1])[share_UX.argmax(-1)].mean(0)


def _entropies(share_UX: np.ndarray) -> dict[str, float | None]:
    most = np.log(share_UX.shape[1])
    if not most:
        return {'entropy': None, 'entropy_of_mean': None}
    of_users, of_mean = evenness(share_UX).mean(), evenness(share_UX.mean(0))
    return {'entropy': float(of_users), 'entropy_of_mean': float(of_mean)}


def evenness(share_BX: np.ndarray) -> np.ndarray:
    """The entropy of shares along the last axis, in units of its maximum; 0 of one share."""
    log = np.log(np.where(share_BX > 0, share_BX, 1))
    return -np.sum(share_BX * log, axis=-1) / np.log(max(share_BX.shape[-1], 2))


def choose(
    rank_U: np.ndarray,
    length_U: np.ndarray,
    last_rank: int,
    share_UH: np.ndarray | None = None,
    variety_U: np.ndarray | None = None,
) -> list[tuple[str, int]]:
    """Whom to show, by rules that nobody can bend; the first in order where users are alike.

    Args:
      rank_U: int, masked ranks of the targets.
      length_U: int, items of the histories.
      last_rank: V; a target there may be one that the history holds, and is not shown as missed.
      share_UH: the gate's shares, for a model with heads.
      variety_U: int, different items in all heads' lists.

    Returns:
      The rule in words and the user's place, each user once.
    """
    user_U = np.arange(len(rank_U))
    hit_U, missed_U = rank_U <= 3, (rank_U > 10) & (rank_U < last_rank)
    rules = []
    if share_UH is None or share_UH.shape[1] < 2:
        rules.append(('the target is at rank 1 to 3: the first such user', hit_U, user_U))
    else:
        even_U = evenness(share_UH)
        rule = 'the target is at rank 1 to 3, and the gate leans most to one head'
        rules.append((rule, hit_U, even_U))
        rule = "the heads' lists have the least in common, and the gate is the most even"
        rules.append((rule, user_U >= 0, -2.0 * variety_U - even_U))
    rules.append(('missed: the target is furthest down', missed_U, -rank_U))
    rules.append(('the longest history', user_U >= 0, -length_U))
    chosen: list[tuple[str, int]] = []
    for rule, allowed_U, key_U in rules:
        allowed_U = allowed_U & ~np.isin(user_U, [user for _, user in chosen])
        if allowed_U.any():
            allowed = np.flatnonzero(allowed_U)
            chosen.append((rule, int(allowed[np.argmin(key_U[allowed])])))
    return chosen
