"""The dense form: the cross-entropy over all items at once, its gradients formed with its value.

On a CPU it is bound by its three products; benchmarks/loss_alone.py has the alternatives it was
chosen from.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from fame_jax.losses.pieces import chunk_of, d_weight, matmul, put, rows, rowwise, weigh


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def dense(
    chunk: int,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As `chunked_cross_entropy`, `chunk` tokens at a time; 0, or as many as there are: all."""
    # The compiler drops the gradients that nobody asks for here.
    return _forward(chunk, query_TD, item_VD, target_T, weight_T, num_tokens)[0]


def _block(
    query_TD: jax.Array, item_VD: jax.Array, picked_TD: jax.Array, weight_T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses [T], their gradients by the queries [T, D], and by the items, less targets [D, V]."""
    logit_TV = matmul(query_TD, item_VD.T)
    max_T = logit_TV.max(axis=1)
    exp_TV = jnp.exp(logit_TV - max_T[:, None])
    total_T = exp_TV.sum(axis=1)
    loss_T = max_T + jnp.log(total_T) - rowwise(query_TD, picked_TD)
    # Dividing by the total is left to the small factors, so no other pass over [T, V] is needed.
    exp_TV = exp_TV.astype(query_TD.dtype)
    d_query_TD = matmul(exp_TV, item_VD) / total_T[:, None] - picked_TD
    scaled_TD = (query_TD * (weight_T / total_T)[:, None]).astype(query_TD.dtype)
    # The barrier keeps the transpose that will follow out of the product. XLA would fold it in, and
    # [V, T] @ [T, D] takes a CPU 1.3 times as long as [D, T] @ [T, V], 2.8 times if V is 12,288.
    return loss_T, d_query_TD, lax.optimization_barrier(matmul(scaled_TD.T, exp_TV))


def _forward(
    chunk: int,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    num_tokens: jax.Array | None = None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    T, D = query_TD.shape
    # A slice without the padding: to mask its column would cost a second [T, V] buffer.
    rest_VD = item_VD[1:]
    picked_TD = item_VD[target_T]
    if chunk in range(1, T):

        def add_chunk(i: jax.Array, carry: tuple) -> tuple:
            loss_T, d_query_TD, d_item_DV = carry
            start, fresh = chunk_of(i, chunk, T)
            query, picked, weight = rows(start, chunk, query_TD, picked_TD, weight_T)
            weight = jnp.where(fresh, weight, 0)
            loss, d_query, d_item = _block(query, rest_VD, picked, weight)
            # A row that was seen before is written again, with what it held.
            loss_T = put(start, loss_T, loss)
            d_query_TD = put(start, d_query_TD, d_query)
            return loss_T, d_query_TD, d_item_DV + d_item

        zeros = jnp.zeros(T), jnp.zeros((T, D)), jnp.zeros((D, rest_VD.shape[0]))
        # A number that only the device knows makes a loop of as many turns as it takes.
        turns = -(-(T if num_tokens is None else num_tokens) // chunk)
        loss_T, d_query_TD, d_item_DV = lax.fori_loop(0, turns, add_chunk, zeros)
    else:
        loss_T, d_query_TD, d_item_DV = _block(query_TD, rest_VD, picked_TD, weight_T)
    d_query_TD = d_query_TD * weight_T[:, None]
    d_item_VD = jnp.pad(d_item_DV.T, ((1, 0), (0, 0)))
    d_item_VD = d_item_VD.at[target_T].add(-query_TD * weight_T[:, None])
    saved = loss_T, weight_T, d_query_TD.astype(query_TD.dtype), d_item_VD.astype(item_VD.dtype)
    return weigh(loss_T, weight_T), saved


def backward(
    chunk: int, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    """The gradients that the forward pass has formed, times what follows."""
    loss_T, weight_T, d_query_TD, d_item_VD = saved
    scale, _ = cotangents
    d_query_TD, d_item_VD = ((scale * x).astype(x.dtype) for x in (d_query_TD, d_item_VD))
    return d_query_TD, d_item_VD, None, d_weight(loss_T, weight_T, cotangents), None


dense.defvjp(_forward, backward)
