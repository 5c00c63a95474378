"""Metrics of ranks, and the popularity baseline."""

import numpy as np

CUTOFFS = (5, 10, 20)
PROTOCOLS = ('masked', 'unmasked')


def metrics(rank_U: np.ndarray) -> dict[str, float]:
    """HR@k and NDCG@k for k in `CUTOFFS`, and MRR: means over users with one relevant item each.

    NDCG@k is 1 / log2(1 + rank) for ranks up to k, else 0: with one relevant item the ideal DCG
    is 1.

    Args:
      rank_U: int [U], 1 is best.

    Raises:
      ValueError: without users, or for a rank below 1.
    """
    if not len(rank_U) or rank_U.min() < 1:
        raise ValueError('ranks start at 1, and at least one is needed')
    rank_U = rank_U.astype(np.float64)
    result = {}
    for k in CUTOFFS:
        result[f'hr@{k}'] = float(np.mean(rank_U <= k))
    for k in CUTOFFS:
        result[f'ndcg@{k}'] = float(np.mean(np.where(rank_U <= k, 1 / np.log2(1 + rank_U), 0)))
    return {**result, 'mrr': float(np.mean(1 / rank_U))}


def log_name(metric: str, protocol: str) -> str:
    """The name of a metric in metrics.jsonl: the protocol stands before it, unless it is masked."""
    return metric if protocol == 'masked' else f'{protocol}/{metric}'


def popularity(items: np.ndarray, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """The popularity baseline as a model: the score of an item is its number of training actions.

    Args:
      items: int32, the items of all training actions.
      num_items: V.

    Returns:
      query_D, ones [1], the query of every user, and item_VD, the counts, float32 [V + 1, 1].
    """
    count_V = np.bincount(items, minlength=num_items + 1).astype(np.float32)
    return np.ones(1, np.float32), count_V[:, None]
