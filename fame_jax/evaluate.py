"""The rank of each user's held-out item among all items, and what is told of the ranks.

Two protocols from one pass. Unmasked ranks among the whole catalogue; masked puts the items that
are already in the user's history below all others (score -inf). In both a tie counts against the
target, the padding is no item, and a NaN anywhere is an error and not a rank.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

CUTOFFS = (5, 10, 20)
PROTOCOLS = ('masked', 'unmasked')

# Scores of so many queries are held at a time, before they are combined.
QUERIES_AT_A_TIME = 1024


class Ranks(NamedTuple):
    """1 is best. int32 [U] each, in the order of users."""

    masked: np.ndarray
    unmasked: np.ndarray


def rank(score_BV: Array, target_B: Array, seen_BS: Array) -> tuple[Array, Array, Array]:
    """Ranks one target a row.

    The masked rank is the unmasked one less the seen items that stand above or beside the target,
    which is exact and spares a second pass over V. A target that is itself in the history scores
    -inf when masked, and then every other item stands above or beside it.

    Args:
      score_BV: float, by item id; column 0 is the padding's.
      target_B: int32 ids.
      seen_BS: int32 ids, distinct in a row, 0 for none.

    Returns:
      masked_B and unmasked_B, int32, and broken_B, bool: whether the row holds a NaN.
    """
    num_items = score_BV.shape[1] - 1
    target_score_B1 = jnp.take_along_axis(score_BV, target_B[:, None], axis=1)
    item_1V = jnp.arange(num_items + 1)[None, :]
    ahead_BV = (score_BV >= target_score_B1) & (item_1V > 0)
    unmasked_B = jnp.sum(ahead_BV, axis=1, dtype=jnp.int32)  # the target is ahead of itself: + 1
    seen_score_BS = jnp.take_along_axis(score_BV, seen_BS, axis=1)
    seen_ahead_BS = (seen_score_BS >= target_score_B1) & (seen_BS > 0)
    masked_B = unmasked_B - jnp.sum(seen_ahead_BS, axis=1, dtype=jnp.int32)
    repeated_B = jnp.any(seen_BS == target_B[:, None], axis=1)
    last_B = repeated_B | (target_score_B1[:, 0] == -jnp.inf)
    masked_B = jnp.where(last_B, num_items, masked_B)
    broken_B = jnp.any(jnp.isnan(score_BV) & (item_1V > 0), axis=1)
    return masked_B, unmasked_B, broken_B


@functools.partial(jax.jit, static_argnames=('encode', 'combine'))
def _rank_rows(
    encode: Callable[..., Array],
    combine: Callable[[Array], Array],
    params: Any,
    item_VD: Array,
    rows: tuple,
) -> tuple[Array, Array, Array]:
    tokens_BL, positions_BL, segments_BL, seen_BS, target_B = rows
    query_BQD = encode(params, tokens_BL, positions_BL, segments_BL)
    return rank(scores(query_BQD, item_VD, combine), target_B, seen_BS)


def scores(query_BQD: Array, item_VD: Array, combine: Callable[[Array], Array]) -> Array:
    """Each item's score, float32 [B, V], a few histories at a time where they have many queries."""

    def some(query_BQD: Array) -> Array:
        return combine(
            jnp.einsum('BQD,VD->BQV', query_BQD, item_VD, preferred_element_type=jnp.float32)
        )

    rows, queries, width = query_BQD.shape
    size = max(1, QUERIES_AT_A_TIME // queries)
    if rows <= size:
        return some(query_BQD)
    # By hand and not by vmap, under which an exported `combine` cannot be called.
    parts_NBQD = jnp.pad(query_BQD, ((0, -rows % size), (0, 0), (0, 0)))
    parts_NBQD = parts_NBQD.reshape(-1, size, queries, width)
    return jax.lax.map(some, parts_NBQD).reshape(-1, len(item_VD))[:rows]


def rank_users(
    encode: Callable[..., Array],
    params: Any,
    item_VD: Array,
    held: Iterable[Any],
    num_users: int,
    combine: Callable[[Array], Array],
) -> Ranks:
    """Ranks every user's target on the device; only ranks come back.

    Args:
      encode: (params, tokens_BL, positions_BL, segments_BL) -> query_BQD, the queries of each
        history, of its last column where there is one a column; the same function object each time,
        since it is compiled once for each.
      params: what encode takes.
      item_VD: item vectors by id, [V + 1, D].
      held: chunks with tokens_BL, positions_BL, segments_BL, seen_BS, target_B, user_B; a target of
        0 marks a row that only fills up.
      num_users: U.
      combine: score_BQV -> score_BV.

    Raises:
      FloatingPointError: when a score is NaN.
    """
    pending = [
        (chunk, _rank_rows(encode, combine, params, item_VD, tuple(chunk[:5]))) for chunk in held
    ]
    ranks = Ranks(np.zeros(num_users, np.int32), np.zeros(num_users, np.int32))
    for chunk, (masked_B, unmasked_B, broken_B) in pending:
        real_B = chunk.target_B > 0
        if np.any(np.asarray(broken_B)[real_B]):
            raise FloatingPointError('a score is NaN; the model cannot be judged')
        ranks.masked[chunk.user_B[real_B]] = np.asarray(masked_B)[real_B]
        ranks.unmasked[chunk.user_B[real_B]] = np.asarray(unmasked_B)[real_B]
    return ranks


def metrics(rank_U: np.ndarray) -> dict[str, float]:
    """HR@k, NDCG@k for k in 5, 10, 20, and MRR; means over users, one relevant item each.

    NDCG@k is 1 / log2(1 + rank) within the cut-off, since the ideal gain of one item is 1.

    Args:
      rank_U: int, 1 is best.

    Raises:
      ValueError: without users, or with a rank below 1.
    """
    if not len(rank_U) or rank_U.min() < 1:
        raise ValueError('ranks begin at 1, and there is at least one user')
    rank_U = rank_U.astype(np.float64)
    result = {}
    for k in CUTOFFS:
        result[f'hr@{k}'] = float(np.mean(rank_U <= k))
    for k in CUTOFFS:
        result[f'ndcg@{k}'] = float(np.mean(np.where(rank_U <= k, 1 / np.log2(1 + rank_U), 0)))
    return {**result, 'mrr': float(np.mean(1 / rank_U))}


def popularity(items: np.ndarray, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """The floor: every user gets the items of most actions; a query and item vectors of width 1.

    Args:
      items: int32, the training actions.
      num_items: V.

    Returns:
      query_D, ones [1], and item_VD, float32 counts [V + 1, 1].
    """
    count_V = np.bincount(items, minlength=num_items + 1).astype(np.float32)
    return np.ones(1, np.float32), count_V[:, None]
