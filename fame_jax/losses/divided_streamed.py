"""The streamed form where devices share the work: tokens over `data`, items over `model`.

Each device goes through its own rows a chunk at a time, as `streamed` goes through a table. Between
the devices go, whatever the number of chunks: over `model`, after the first pass, the maxima, sums
and targets' scores, [3, T] for every device that shares the table, and after the second the
gradient by the queries, [T, D]; over `data`, the gradient by a device's rows. Nothing as long as
the table's parts goes over `model`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from fame_jax.losses.pieces import (
    LOWEST,
    d_weight,
    own_rows,
    put_together,
    rowwise,
    sum_over,
    weigh,
)
from fame_jax.losses.streamed import Chunks, Span, add_up, differentiate
from fame_jax.sharding import DATA, MODEL

TOKENS, ITEMS = PartitionSpec(DATA), PartitionSpec(MODEL)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def divided_streamed(
    mesh: Mesh,
    num_items: int,
    chunks: Chunks,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As `divided_cross_entropy`, where chunks.items is smaller than a device's rows."""
    return _forward(mesh, num_items, chunks, query_TD, item_VD, target_T, weight_T)[0]


def _forward(
    mesh: Mesh,
    num_items: int,
    chunks: Chunks,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    part = jax.shard_map(
        partial(_add_up_part, num_items, chunks),
        mesh=mesh,
        in_specs=(TOKENS, ITEMS, TOKENS),
        out_specs=(TOKENS, TOKENS),
        check_vma=False,
    )
    total_T, loss_T = part(query_TD, item_VD, target_T)
    saved = query_TD, item_VD, target_T, weight_T, total_T, loss_T
    return weigh(loss_T, weight_T), saved


def _add_up_part(
    num_items: int,
    chunks: Chunks,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One device's part of the first pass: its tokens' log Z over all items, and their losses.

    T and V are the device's own here.
    """
    which = _own(num_items, item_VD)
    mine_T, row_T = own_rows(which.first, len(item_VD), target_T)
    picked_T = jnp.where(mine_T, rowwise(query_TD, chunks.prepare(item_VD[row_T])), 0)
    # Looked up before the loop, and the loop begun with it, for what `streamed` does it for.
    max_T = jnp.where(mine_T, picked_T, LOWEST)
    max_T, sum_T = add_up(chunks, which, query_TD, item_VD, max_T)
    all_M3T = lax.all_gather(jnp.stack([max_T, sum_T, picked_T]), MODEL)
    highest_T, sum_T = put_together(all_M3T[:, 0], all_M3T[:, 1])
    total_T = highest_T + jnp.log(sum_T)
    return total_T, total_T - all_M3T[:, 2].sum(axis=0)


def _backward(
    mesh: Mesh,
    num_items: int,
    chunks: Chunks,
    saved: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    query_TD, item_VD, target_T, weight_T, total_T, loss_T = saved
    part = jax.shard_map(
        partial(_differentiate_part, num_items, chunks),
        mesh=mesh,
        in_specs=(TOKENS, ITEMS, TOKENS, TOKENS, TOKENS),
        out_specs=(TOKENS, ITEMS),
        check_vma=False,
    )
    scale_T = weight_T * cotangents[0]
    d_query_TD, d_item_VD = part(query_TD, item_VD, target_T, total_T, scale_T)
    return d_query_TD, d_item_VD, None, d_weight(loss_T, weight_T, cotangents)


def _differentiate_part(
    num_items: int,
    chunks: Chunks,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    total_T: jax.Array,
    scale_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One device's part of the second pass: the gradients by its tokens' queries and its rows.

    A device gives its rows what its tokens have to do with them; the pull through `prepare` is
    linear, so raw gradients are what is summed over `data`.
    """
    which = _own(num_items, item_VD)
    data = query_TD, item_VD, target_T, total_T, scale_T
    d_query_TD, d_item_VD = differentiate(chunks, which, *data)
    d_query_TD = sum_over(d_query_TD, MODEL).astype(query_TD.dtype)
    return d_query_TD, sum_over(d_item_VD, DATA)


def _own(num_items: int, item_VD: jax.Array) -> Span:
    """All rows of a device's part, and whose they are."""
    return Span(start=0, first=lax.axis_index(MODEL) * len(item_VD), num_items=num_items)


divided_streamed.defvjp(_forward, _backward)
