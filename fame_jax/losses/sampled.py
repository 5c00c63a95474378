"""Losses over the target and a few negatives, and how negatives are drawn."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax.losses.pieces import as_they_are, matmul, real, rowwise, weigh


def binary_cross_entropy(
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    negative_TR: jax.Array,
    weight_T: jax.Array,
    negative_weight_TR: jax.Array,
    prepare: Callable[[jax.Array], jax.Array] = as_they_are,
) -> tuple[jax.Array, jax.Array]:
    """Binary cross-entropy of the target against negatives of its own.

        sum_t w_t (-log sig(q_t . x_{y_t}) - mean_{r valid} log(1 - sig(q_t . x_{n_tr})))

    The loss of SASRec (Kang & McAuley 2018, arXiv 1808.09781), where R is 1. A token without a
    valid negative keeps its first term.

    Args:
      query_TD: [T, D] float32 or bfloat16.
      item_VD: [V + 1, D], the table; row 0 is the padding.
      target_T: [T] int32 in 1..V; any id where the weight is 0.
      negative_TR: [T, R] int32 in 1..V; any id where its weight is 0.
      weight_T: [T] float32, 0 for a token that does not count.
      negative_weight_TR: [T, R] float32, 0 for a negative that is not valid (it is the target, or
          an item of the user's history); the mean is weighted by it.
      prepare: rows of the table -> their vectors, [n, D] -> [n, D].

    Returns:
      The weighted sum and the sum of the weights, both float32 scalars.
    """
    picked_TD, negative = _pick(item_VD, prepare, real(target_T), real(negative_TR))
    positive_T = rowwise(query_TD, picked_TD)
    score_TR = rowwise(query_TD, negative)
    # log(1 - sig(s)) = log sig(-s), which keeps its digits where sig(s) rounds to one.
    lost_T = -(jax.nn.log_sigmoid(-score_TR) * negative_weight_TR).sum(axis=1)
    valid_T = negative_weight_TR.sum(axis=1)
    mean_T = lost_T / jnp.where(valid_T > 0, valid_T, 1)
    return weigh(mean_T - jax.nn.log_sigmoid(positive_T), weight_T)


def sampled_cross_entropy(
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    negative_TR: jax.Array,
    weight_T: jax.Array,
    *,
    negative_weight_TR: jax.Array | None = None,
    log_q: jax.Array | None = None,
    prepare: Callable[[jax.Array], jax.Array] = as_they_are,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the softmax over the target and the negatives drawn.

        sum_t w_t (log(exp s_ty + sum_{r valid} exp s_tr) - s_ty),  s_tv = q_t . x_v

    Sampled softmax (Jean et al. 2015, arXiv 1412.2007; as a loss for recommendation: Wu et al.
    2022, arXiv 2201.02327). A negative that is the token's own target is left out.

    With `log_q` a negative counts by the inverse of its probability, s_tr - log(R q_r). The sum is
    then an unbiased estimate of the sum over all items but the target (or over those that may be
    valid), and the loss that of the full softmax as R grows. The target is not drawn, it is always
    there, and is not corrected: Khrylchenko et al. 2025, arXiv 2507.09331.

    Args:
      query_TD: [T, D] float32 or bfloat16.
      item_VD: [V + 1, D], the table; row 0 is the padding.
      target_T: [T] int32 in 1..V; any id where the weight is 0.
      negative_TR: [T, R] int32 in 1..V, or [R], shared by the tokens, which is one product.
      weight_T: [T] float32, 0 for a token that does not count.
      negative_weight_TR: [T, R] float32; 0 leaves a negative out, anything else keeps it.
      log_q: float32 in the shape of the negatives, the logarithm of the probability that a draw
          gives this item; None: negatives count as they are.
      prepare: rows of the table -> their vectors, [n, D] -> [n, D].

    Returns:
      The weighted sum and the sum of the weights, both float32 scalars.
    """
    target_T, negative_TR = real(target_T), real(negative_TR)
    picked_TD, negative = _pick(item_VD, prepare, target_T, negative_TR)
    positive_T = rowwise(query_TD, picked_TD)
    shared = negative_TR.ndim == 1
    score_TR = matmul(query_TD, negative.T) if shared else rowwise(query_TD, negative)
    if log_q is not None:
        log_count = log_q + jnp.log(log_q.shape[-1])
        score_TR = score_TR - (log_count[None, :] if shared else log_count)
    valid_TR = (negative_TR[None, :] if shared else negative_TR) != target_T[:, None]
    if negative_weight_TR is not None:
        valid_TR &= negative_weight_TR != 0
    # -inf is safe under logsumexp, forwards and backwards: the target's finite score is always in.
    score_TR = jnp.where(valid_TR, score_TR, -jnp.inf)
    all_TS = jnp.concatenate([positive_T[:, None], score_TR], axis=1)
    return weigh(jax.nn.logsumexp(all_TS, axis=1) - positive_T, weight_T)


def _pick(
    item_VD: jax.Array, prepare: Callable[[jax.Array], jax.Array], *ids: jax.Array
) -> list[jax.Array]:
    """The vectors of several arrays of ids.

    One gather, since each has a table of its own for its gradient.
    """
    row_ND = prepare(item_VD[jnp.concatenate([x.reshape(-1) for x in ids])])
    ends = [sum(x.size for x in ids[: i + 1]) for i in range(len(ids) - 1)]
    return [part.reshape(*x.shape, -1) for part, x in zip(jnp.split(row_ND, ends), ids)]


def draw_negatives(key: jax.Array, shape: tuple[int, ...], num_items: int) -> jax.Array:
    """Item ids drawn uniformly, with replacement, from 1..num_items; int32 of the given shape."""
    return jax.random.randint(key, shape, 1, num_items + 1, jnp.int32)


def cumulate(count_V: np.ndarray) -> np.ndarray:
    """What `draw_popular` draws by: the cumulative sum of an item's actions and one.

    The one is for items without an action: each item may be drawn, so that none is left out of the
    softmax that is estimated.

    Args:
      count_V: int [V + 1], actions by item id; that of the padding is not read.

    Returns:
      int32 [V + 1], 0 for the padding.

    Raises:
      ValueError: with 2^31 actions and more.
    """
    cumulative_V = np.zeros(len(count_V), np.int64)
    np.cumsum(np.asarray(count_V[1:], np.int64) + 1, out=cumulative_V[1:])
    if cumulative_V[-1] >= 2**31:
        raise ValueError(f'{cumulative_V[-1]} actions and items are too many to be drawn by')
    return cumulative_V.astype(np.int32)


def draw_popular(
    key: jax.Array, shape: tuple[int, ...], cumulative_V: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Item ids drawn in proportion to their actions plus one, with replacement.

    A draw is a binary search, so it costs the logarithm of V.

    Args:
      key: consumed.
      shape: of the draws.
      cumulative_V: as `cumulate` makes it.

    Returns:
      int32 ids in 1..V and the logarithms of their probabilities, float32, in the given shape.
    """
    cumulative_V = jnp.asarray(cumulative_V)
    total = cumulative_V[-1]
    drawn = jax.random.randint(key, shape, 0, total, jnp.int32)
    ids = jnp.searchsorted(cumulative_V, drawn, side='right').astype(jnp.int32)
    share = (cumulative_V[ids] - cumulative_V[ids - 1]) / total
    return ids, jnp.log(share)
