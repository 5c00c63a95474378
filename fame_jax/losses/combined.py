"""Cross-entropy over the whole catalogue where a token has several queries."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fame_jax.losses import dense
from fame_jax.losses.pieces import chunk_of, matmul, put, real, rows, weigh


def combined_cross_entropy(
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

    Of multi-intent models such as MiaSRec (arXiv 2405.00986). The gradients are formed with the
    value, a chunk of tokens at a time: three products of [Q T, D] by [D, V], and temporaries of
    chunk_tokens * V floats (a few of them, as `combine` needs) and three tables, whatever T is.

    Args:
      query_TQD: [T, Q, D] float32 or bfloat16.
      item_VD: [V + 1, D], the table; row 0 is the padding.
      target_T: [T] int32 in 1..V; any id where the weight is 0.
      weight_T: [T] float32, 0 for a token that does not count.
      combine: [T, Q, V] float32 scores -> [T, V], each token and item by itself, differentiable;
          the same function every time, or it is compiled anew.
      chunk_tokens: queries at a time, in whole tokens and at least one; 0: all of them.

    Returns:
      As `cross_entropy`.
    """
    if chunk_tokens < 0:
        raise ValueError(f'chunk_tokens must be >= 0, not {chunk_tokens}')
    T, Q, _ = query_TQD.shape
    size = min(T, max(1, chunk_tokens // Q)) if chunk_tokens else T
    return _combined(combine, size, query_TQD, item_VD, real(target_T), weight_T)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _combined(
    combine: Callable[[jax.Array], jax.Array],
    chunk: int,
    query_TQD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return _forward(combine, chunk, query_TQD, item_VD, target_T, weight_T)[0]


def _block(
    combine: Callable[[jax.Array], jax.Array],
    query_TQD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses [T], and the weighted gradients by the queries [T, Q, D] and by the items [D, V].

    S are the queries of all tokens, T * Q.
    """
    T, Q, D = query_TQD.shape
    query_SD = query_TQD.reshape(-1, D)
    score_SV = matmul(query_SD, item_VD.T)
    score_TV, pull = jax.vjp(combine, score_SV.reshape(T, Q, -1))
    max_T = score_TV.max(axis=1)
    exp_TV = jnp.exp(score_TV - max_T[:, None])
    total_T = exp_TV.sum(axis=1)
    here = jnp.arange(T), target_T - 1
    loss_T = max_T + jnp.log(total_T) - score_TV[here]
    d_score_TV = (exp_TV * (weight_T / total_T)[:, None]).at[here].add(-weight_T)
    d_score_SV = pull(d_score_TV)[0].reshape(score_SV.shape).astype(query_TQD.dtype)
    d_query_TQD = matmul(d_score_SV, item_VD).reshape(query_TQD.shape)
    # The barrier is that of `_dense_block`.
    return loss_T, d_query_TQD, lax.optimization_barrier(matmul(query_SD.T, d_score_SV))


def _forward(
    combine: Callable[[jax.Array], jax.Array],
    chunk: int,
    query_TQD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    T, D = query_TQD.shape[0], query_TQD.shape[2]
    rest_VD = item_VD[1:]

    def add_chunk(i: jax.Array, carry: tuple) -> tuple:
        loss_T, d_query_TQD, d_item_DV = carry
        start, fresh = chunk_of(i, chunk, T)
        query, target, weight = rows(start, chunk, query_TQD, target_T, weight_T)
        loss, d_query, d_item = _block(combine, query, rest_VD, target, jnp.where(fresh, weight, 0))
        # A token that was seen before has no weight now; what it got then is added to nothing.
        (old,) = rows(start, chunk, d_query_TQD)
        loss_T = put(start, loss_T, loss)
        d_query_TQD = put(start, d_query_TQD, old + d_query)
        return loss_T, d_query_TQD, d_item_DV + d_item

    zeros = jnp.zeros(T), jnp.zeros(query_TQD.shape), jnp.zeros((D, rest_VD.shape[0]))
    loss_T, d_query_TQD, d_item_DV = lax.fori_loop(0, -(-T // chunk), add_chunk, zeros)
    d_item_VD = jnp.pad(d_item_DV.T, ((1, 0), (0, 0)))
    saved = loss_T, weight_T, d_query_TQD.astype(query_TQD.dtype), d_item_VD.astype(item_VD.dtype)
    return weigh(loss_T, weight_T), saved


def _backward(
    combine: Callable[[jax.Array], jax.Array],
    chunk: int,
    saved: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    return dense.backward(chunk, saved, cotangents)[:4]


_combined.defvjp(_forward, _backward)
