"""Losses over the target and a few sampled negatives, and the sampling of negatives."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fame_jax.losses.ops import (
    identity,
    matmul,
    mix_items,
    replace_padding,
    rowwise,
    weighted_sum,
)


def binary_cross_entropy(
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    negative_TR: jax.Array,
    weight_T: jax.Array,
    negative_weight_TR: jax.Array,
    item_transform: Callable[[jax.Array], jax.Array] = identity,
    *,
    share_TF: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Binary cross-entropy of each token's target against its own negatives.

        sum_t w_t (-log sig(q_t . x_{y_t}) - mean_{r valid} log(1 - sig(q_t . x_{n_tr})))

    The loss of SASRec (Kang & McAuley 2018, arXiv 1808.09781), where R is 1. A token without a
    valid negative has the first term alone. With soft labels the first term is the mean over the
    targets by their shares.

    Args:
      query_TD: [T, D] float32 or bfloat16.
      item_VD: [V + 1, D], the item table; row 0 is the padding.
      target_T: [T] int32 in 1..V; any id where the weight is 0.
      negative_TR: [T, R] int32 in 1..V; any id where its weight is 0.
      weight_T: [T] float32, 0 for a token that does not count.
      negative_weight_TR: [T, R] float32, the weights of the mean over negatives; 0 for an invalid
        negative (the target, or an item of the user's history).
      item_transform: table rows -> item vectors, [n, D] -> [n, D].
      share_TF: [T, F] float32, shares of the targets, which then are [T, F]; None: one target.

    Returns:
      The weighted sum and the sum of the weights, both float32 scalars.
    """
    ids = replace_padding(target_T), replace_padding(negative_TR)
    target, negative = _gather(item_VD, item_transform, *ids)
    target_loss_T = -jax.nn.log_sigmoid(rowwise(query_TD, target))
    if share_TF is not None:
        target_loss_T = (share_TF * target_loss_T).sum(axis=1)
    score_TR = rowwise(query_TD, negative)
    # log(1 - sig(s)) = log sig(-s), which is accurate where sig(s) rounds to one.
    negative_loss_T = -(jax.nn.log_sigmoid(-score_TR) * negative_weight_TR).sum(axis=1)
    valid_T = negative_weight_TR.sum(axis=1)
    mean_T = negative_loss_T / jnp.where(valid_T > 0, valid_T, 1)
    return weighted_sum(mean_T + target_loss_T, weight_T)


def sampled_cross_entropy(
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    negative_TR: jax.Array,
    weight_T: jax.Array,
    *,
    negative_weight_TR: jax.Array | None = None,
    log_q: jax.Array | None = None,
    share_TF: jax.Array | None = None,
    item_transform: Callable[[jax.Array], jax.Array] = identity,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the softmax over the target and the sampled negatives.

        sum_t w_t (log(exp s_ty + sum_{r valid} exp s_tr) - s_ty),  s_tv = q_t . x_v

    Sampled softmax (Jean et al. 2015, arXiv 1412.2007; as a loss for recommendation: Wu et al.
    2022, arXiv 2201.02327). A negative that equals the token's target is left out. With soft labels
    the last term is the mean score of the targets by their shares, and the sum has the first
    target, of which the sampled negatives are again all others.

    With `log_q` each negative is weighted by the inverse of its sampling probability: its score
    becomes s_tr - log(R q_r). The sum is then an unbiased estimate of the sum over all items but
    the target (or over all valid ones), and the loss approaches that of the full softmax as R
    grows. The target's score is not corrected, since the target is always included and not sampled:
    Khrylchenko et al. 2025, arXiv 2507.09331.

    Args:
      query_TD: [T, D] float32 or bfloat16.
      item_VD: [V + 1, D], the item table; row 0 is the padding.
      target_T: [T] int32 in 1..V; any id where the weight is 0.
      negative_TR: [T, R] int32 in 1..V, or [R], shared by all tokens: their scores are one product.
      weight_T: [T] float32, 0 for a token that does not count.
      negative_weight_TR: [T, R] float32; 0 leaves a negative out, any other value keeps it.
      log_q: float32 in the shape of the negatives, the logarithm of the probability that a draw
        gives this item; None: no correction.
      share_TF: [T, F] float32, shares of the targets, which then are [T, F]; None: one target.
      item_transform: table rows -> item vectors, [n, D] -> [n, D].

    Returns:
      The weighted sum and the sum of the weights, both float32 scalars.
    """
    target_T, negative_TR = replace_padding(target_T), replace_padding(negative_TR)
    target, negative = _gather(item_VD, item_transform, target_T, negative_TR)
    picked_T = rowwise(query_TD, mix_items(target, share_TF))
    target_score_T = picked_T
    if share_TF is not None:
        target_T, target_score_T = target_T[:, 0], rowwise(query_TD, target[:, 0])
    shared = negative_TR.ndim == 1
    score_TR = matmul(query_TD, negative.T) if shared else rowwise(query_TD, negative)
    if log_q is not None:
        log_count = log_q + jnp.log(log_q.shape[-1])
        score_TR = score_TR - (log_count[None, :] if shared else log_count)
    valid_TR = (negative_TR[None, :] if shared else negative_TR) != target_T[:, None]
    if negative_weight_TR is not None:
        valid_TR &= negative_weight_TR != 0
    # logsumexp and its gradient are finite with scores of -inf, since the target's is finite.
    score_TR = jnp.where(valid_TR, score_TR, -jnp.inf)
    all_TS = jnp.concatenate([target_score_T[:, None], score_TR], axis=1)
    return weighted_sum(jax.nn.logsumexp(all_TS, axis=1) - picked_T, weight_T)


def _gather(
    item_VD: jax.Array, item_transform: Callable[[jax.Array], jax.Array], *ids: jax.Array
) -> list[jax.Array]:
    """The item vectors of several arrays of ids, shape [*ids.shape, D] each.

    All in one gather, since the gradient of each gather is a buffer of the table's size.
    """
    row_ND = item_transform(item_VD[jnp.concatenate([x.reshape(-1) for x in ids])])
    ends = [sum(x.size for x in ids[: i + 1]) for i in range(len(ids) - 1)]
    return [part.reshape(*x.shape, -1) for part, x in zip(jnp.split(row_ND, ends), ids)]


def draw_negatives(key: jax.Array, shape: tuple[int, ...], num_items: int) -> jax.Array:
    """Item ids drawn uniformly, with replacement, from 1..num_items; int32 of the given shape."""
    return jax.random.randint(key, shape, 1, num_items + 1, jnp.int32)


def cumulative_counts(count_V: np.ndarray) -> np.ndarray:
    """The cumulative sum over items of (number of actions + 1), from which `draw_popular` samples.

    The 1 gives items without an action a positive probability; otherwise the estimated softmax
    would leave them out.

    Args:
      count_V: int [V + 1], number of actions of each item id; entry 0, the padding, is ignored.

    Returns:
      int32 [V + 1], starting with 0 for the padding.

    Raises:
      ValueError: when the sum of counts does not fit in int32.
    """
    cumulative_V = np.zeros(len(count_V), np.int64)
    np.cumsum(np.asarray(count_V[1:], np.int64) + 1, out=cumulative_V[1:])
    if cumulative_V[-1] >= 2**31:
        raise ValueError(f'{cumulative_V[-1]} actions and items are too many: at most {2**31 - 1}')
    return cumulative_V.astype(np.int32)


def draw_popular(
    key: jax.Array, shape: tuple[int, ...], cumulative_V: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Item ids drawn with probability proportional to actions + 1, with replacement.

    Each draw is a binary search over V.

    Args:
      key: PRNG key, used up.
      shape: the shape of the drawn ids.
      cumulative_V: from `cumulative_counts`.

    Returns:
      int32 ids in 1..V and the logarithms of their probabilities, float32, of the given shape.
    """
    cumulative_V = jnp.asarray(cumulative_V)
    total = cumulative_V[-1]
    drawn = jax.random.randint(key, shape, 0, total, jnp.int32)
    ids = jnp.searchsorted(cumulative_V, drawn, side='right').astype(jnp.int32)
    share = (cumulative_V[ids] - cumulative_V[ids - 1]) / total
    return ids, jnp.log(share)
