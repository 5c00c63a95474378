"""Cross-entropy over the whole catalogue where a token has several queries."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fame_jax.losses.ops import (
    chunk_slice,
    dynamic_slices,
    dynamic_update_slice,
    matmul,
    replace_padding,
    scale_gradients,
    weighted_sum,
)


def multi_query_cross_entropy(
    query_TQD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    *,
    combine: Callable[[jax.Array], jax.Array],
    chunk_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy over the whole catalogue where a token has several queries.

        sum_t w_t (log sum_{v=1..V} exp s_tv - s_{t y_t}),  s_tv = combine over q of (q_tq . x_v)

    For multi-interest models such as MiaSRec (arXiv 2405.00986). The gradients are formed together
    with the value, a chunk of tokens at a time: three products of [Q T, D] by [D, V]. Temporaries
    are a few times chunk_tokens * V floats, as `combine` needs, and three tables, for every T.

    Args:
      query_TQD: [T, Q, D] float32 or bfloat16.
      item_VD: [V + 1, D], the item table; row 0 is the padding.
      target_T: [T] int32 in 1..V; any id where the weight is 0.
      weight_T: [T] float32, 0 for a token that does not count.
      combine: [T, Q, V] float32 scores -> [T, V], each token and item on its own, differentiable.
        It must be the same function object in every call, since programs are cached by it.
      chunk_tokens: queries per chunk, rounded down to whole tokens, at least one; 0: all.

    Returns:
      The weighted sum and the sum of the weights, both float32 scalars. Gradients have the dtypes
      of the inputs.

    Raises:
      ValueError: for a negative chunk size.
    """
    if chunk_tokens < 0:
        raise ValueError(f'chunk_tokens must be >= 0, not {chunk_tokens}')
    T, Q, _ = query_TQD.shape
    size = min(T, max(1, chunk_tokens // Q)) if chunk_tokens else T
    return _multi_query(combine, size, query_TQD, item_VD, replace_padding(target_T), weight_T)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _multi_query(
    combine: Callable[[jax.Array], jax.Array],
    chunk_tokens: int,
    query_TQD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return _forward(combine, chunk_tokens, query_TQD, item_VD, target_T, weight_T)[0]


def _block(
    combine: Callable[[jax.Array], jax.Array],
    query_TQD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses [T], and the weighted gradients by queries [T, Q, D] and by item vectors [D, V].

    S counts the queries of all tokens, T * Q.
    """
    T, Q, D = query_TQD.shape
    query_SD = query_TQD.reshape(-1, D)
    score_SV = matmul(query_SD, item_VD.T)
    score_TV, combine_vjp = jax.vjp(combine, score_SV.reshape(T, Q, -1))
    max_T = score_TV.max(axis=1)
    exp_TV = jnp.exp(score_TV - max_T[:, None])
    sum_T = exp_TV.sum(axis=1)
    target = jnp.arange(T), target_T - 1
    loss_T = max_T + jnp.log(sum_T) - score_TV[target]
    d_score_TV = (exp_TV * (weight_T / sum_T)[:, None]).at[target].add(-weight_T)
    d_score_SV = combine_vjp(d_score_TV)[0].reshape(score_SV.shape).astype(query_TQD.dtype)
    d_query_TQD = matmul(d_score_SV, item_VD).reshape(query_TQD.shape)
    # For the barrier see `cross_entropy._block`.
    return loss_T, d_query_TQD, lax.optimization_barrier(matmul(query_SD.T, d_score_SV))


def _forward(
    combine: Callable[[jax.Array], jax.Array],
    chunk_tokens: int,
    query_TQD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    T, D = query_TQD.shape[0], query_TQD.shape[2]
    rest_VD = item_VD[1:]

    def add_chunk(i: jax.Array, carry: tuple) -> tuple:
        loss_T, d_query_TQD, d_item_DV = carry
        start, is_new = chunk_slice(i, chunk_tokens, T)
        query, target, weight, old = dynamic_slices(
            start, chunk_tokens, query_TQD, target_T, weight_T, d_query_TQD
        )
        weight = jnp.where(is_new, weight, 0)
        loss, d_query, d_item = _block(combine, query, rest_VD, target, weight)
        # Tokens in the overlap have weight 0 here, so their gradients stay as they were.
        loss_T = dynamic_update_slice(loss_T, loss, start)
        d_query_TQD = dynamic_update_slice(d_query_TQD, old + d_query, start)
        return loss_T, d_query_TQD, d_item_DV + d_item

    zeros = jnp.zeros(T), jnp.zeros(query_TQD.shape), jnp.zeros((D, rest_VD.shape[0]))
    iterations = -(-T // chunk_tokens)
    loss_T, d_query_TQD, d_item_DV = lax.fori_loop(0, iterations, add_chunk, zeros)
    d_item_VD = jnp.pad(d_item_DV.T, ((1, 0), (0, 0)))
    saved = loss_T, weight_T, d_query_TQD.astype(query_TQD.dtype), d_item_VD.astype(item_VD.dtype)
    return weighted_sum(loss_T, weight_T), saved


def _backward(
    combine: Callable[[jax.Array], jax.Array],
    chunk_tokens: int,
    saved: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    return scale_gradients(saved, cotangents)


_multi_query.defvjp(_forward, _backward)
