"""The dense form where devices share the work: tokens over `data`, items over `model`.

Each device multiplies its tokens by its items and no more. Between them go, over `model`: the
targets' vectors [T, D], the maxima and sums of each chunk's softmax, [2, T] for every device that
shares the table, and the gradient by the queries [T, D]; over `data`: the gradient by a device's
items. Nothing as long as the table goes anywhere, nor is it whole on any device.

With chunks of items it is `divided_streamed` that does the work.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from fame_jax.losses.divided_streamed import divided_streamed
from fame_jax.losses.pieces import (
    LOWEST,
    as_they_are,
    check_chunks,
    chunk_of,
    d_weight,
    matmul,
    own_rows,
    put,
    put_together,
    real,
    rows,
    rowwise,
    sum_over,
    weigh,
)
from fame_jax.losses.streamed import Chunks
from fame_jax.sharding import DATA, MODEL


def divided_cross_entropy(
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    *,
    mesh: Mesh,
    num_items: int,
    chunk_tokens: int,
    chunk_items: int = 0,
    prepare: Callable[[jax.Array], jax.Array] = as_they_are,
) -> tuple[jax.Array, jax.Array]:
    """The value and the gradients of `cross_entropy`, the catalogue split over devices.

    Vocabulary-parallel cross-entropy (Shoeybi et al. 2019, arXiv 1909.08053, section 3), its
    gradients formed with its value. A device's temporaries are chunk_tokens * V / M floats, with M
    devices along `model`, and several times its part of the table. With chunks of items they are
    those of `chunked_cross_entropy`, of its own tokens, and one gradient by its rows where that is
    yet to be summed over `data`; there are four products then instead of three.

    Args:
      query_TD: [T, D] float32 or bfloat16, split over `data`; T a multiple of those devices.
      item_VD: [rows, D], split over `model`; row 0 is the padding, rows past V are nobody's.
      target_T: [T] int32 in 1..V; any id where the weight is 0.
      weight_T: [T] float32, 0 for a token that does not count.
      mesh: the devices.
      num_items: V.
      chunk_tokens: of a device's tokens, so many at a time; 0: all.
      chunk_items: of a device's rows, so many at a time; 0, or no fewer than there are: all.
      prepare: rows of the table -> their vectors, as `chunked_cross_entropy` has it.

    Returns:
      As `cross_entropy`.
    """
    check_chunks(chunk_tokens, chunk_items)
    target_T = real(target_T)
    if chunk_items in range(1, len(item_VD) // mesh.shape[MODEL]):
        chunks = Chunks(chunk_tokens, chunk_items, prepare)
        return divided_streamed(mesh, num_items, chunks, query_TD, item_VD, target_T, weight_T)
    vector_VD = prepare(item_VD)
    return _divided(mesh, num_items, chunk_tokens, query_TD, vector_VD, target_T, weight_T)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _divided(
    mesh: Mesh,
    num_items: int,
    chunk: int,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return _forward(mesh, num_items, chunk, query_TD, item_VD, target_T, weight_T)[0]


def _forward(
    mesh: Mesh,
    num_items: int,
    chunk: int,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    tokens, items = PartitionSpec(DATA), PartitionSpec(MODEL)
    part = jax.shard_map(
        partial(_part, num_items, chunk),
        mesh=mesh,
        in_specs=(tokens, items, tokens, tokens),
        out_specs=(tokens, tokens, items),
        check_vma=False,
    )
    loss_T, d_query_TD, d_item_VD = part(query_TD, item_VD, target_T, weight_T)
    return weigh(loss_T, weight_T), (loss_T, weight_T, d_query_TD, d_item_VD)


def _part(
    num_items: int,
    chunk: int,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One device's part: the losses of its tokens and the weighted gradients by them and its items.

    T and V are the device's own here.
    """
    (T, D), V = query_TD.shape, len(item_VD)
    first = lax.axis_index(MODEL) * V
    id_V = first + jnp.arange(V)
    real_1V = ((id_V > 0) & (id_V <= num_items))[None, :]
    mine_T, here_T = own_rows(first, V, target_T)
    picked_TD = sum_over(jnp.where(mine_T[:, None], item_VD[here_T], 0), MODEL)
    size = min(chunk, T) or T

    def add_chunk(i: jax.Array, carry: tuple) -> tuple:
        loss_T, d_query_TD, d_item_DV = carry
        start, fresh = chunk_of(i, size, T)
        query, picked, weight = rows(start, size, query_TD, picked_TD, weight_T)
        logit_TV = jnp.where(real_1V, matmul(query, item_VD.T), -jnp.inf)
        # Finite on a device without a real item too, for what is subtracted from.
        max_T = jnp.maximum(logit_TV.max(axis=1), LOWEST)
        exp_TV = jnp.exp(logit_TV - max_T[:, None])
        log_total_T, share_T = _over_devices(max_T, exp_TV.sum(axis=1))
        exp_TV = exp_TV.astype(query.dtype)
        d_query = matmul(exp_TV, item_VD) * share_T[:, None]
        scaled = query * (jnp.where(fresh, weight, 0) * share_T)[:, None]
        d_item = matmul(scaled.astype(query.dtype).T, exp_TV)
        loss_T = put(start, loss_T, log_total_T - rowwise(query, picked))
        return loss_T, put(start, d_query_TD, d_query), d_item_DV + d_item

    zeros = jnp.zeros(T), jnp.zeros((T, D)), jnp.zeros((D, V))
    loss_T, d_query_TD, d_item_DV = lax.fori_loop(0, -(-T // size), add_chunk, zeros)
    d_query_TD = (sum_over(d_query_TD, MODEL) - picked_TD) * weight_T[:, None]
    own_TD = jnp.where(mine_T[:, None], -query_TD * weight_T[:, None], 0)
    d_item_VD = sum_over(d_item_DV.T.at[here_T].add(own_TD), DATA)
    return loss_T, d_query_TD.astype(query_TD.dtype), d_item_VD.astype(item_VD.dtype)


def _over_devices(max_T: jax.Array, total_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logarithm of the sum of all devices' exponentials, and this one's scale in that sum."""
    all_M2T = lax.all_gather(jnp.stack([max_T, total_T]), MODEL)
    highest_T, sum_T = put_together(all_M2T[:, 0], all_M2T[:, 1])
    return highest_T + jnp.log(sum_T), jnp.exp(max_T - highest_T) / sum_T


def _backward(
    mesh: Mesh,
    num_items: int,
    chunk: int,
    saved: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    loss_T, weight_T, d_query_TD, d_item_VD = saved
    scale, _ = cotangents
    d_query_TD, d_item_VD = ((scale * x).astype(x.dtype) for x in (d_query_TD, d_item_VD))
    return d_query_TD, d_item_VD, None, d_weight(loss_T, weight_T, cotangents)


_divided.defvjp(_forward, _backward)
