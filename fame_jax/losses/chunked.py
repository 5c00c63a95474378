"""The chunked form of the cross-entropy: a chunk of items at a time, on one device or on a mesh.

Two passes over the table, in each of which every chunk is read and transformed once. The first pass
has one product and gives log Z; the second repeats the product and forms both gradients, three
products. Fewer do not suffice: the gradient of an item is a sum over tokens of exp(s) / Z times a
query, every token has its own Z, and Z is known only after all items.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from fame_jax.losses.ops import (
    LOWEST,
    chunk_slice,
    dynamic_slices,
    dynamic_update_slice,
    local_rows,
    matmul,
    merge_sums,
    mix_items,
    psum,
    rowwise,
    weight_gradient,
    weighted_sum,
)
from fame_jax.parallel.mesh import DATA, MODEL

ROW_MAJOR = Layout((0, 1))
TOKENS, ITEMS = PartitionSpec(DATA), PartitionSpec(MODEL)


class Chunks(NamedTuple):
    """Static options of the chunked form, as `cross_entropy` has them.

    Attributes:
      tokens: tokens per chunk; 0: all.
      items: items per chunk, at most as many as a device has rows.
      item_transform: table rows -> item vectors.
      mesh: the devices; None: one device.
      num_items: V; None without a mesh.
    """

    tokens: int
    items: int
    item_transform: Callable[[jax.Array], jax.Array]
    mesh: Mesh | None
    num_items: int | None


class RowRange(NamedTuple):
    """The rows of a device's table that the passes go over, and their item ids.

    Attributes:
      start: the first row; rows before it are never read.
      first_id: the id of that row, an int or an int32 scalar.
      num_items: V; rows with id 0 or an id past V are padding. None: no row is padding.
    """

    start: int
    first_id: jax.Array | int
    num_items: int | None


# On one device: all rows but the padding row 0.
ALL_ITEMS = RowRange(start=1, first_id=1, num_items=None)


def _shard_rows(chunks: Chunks, item_VD: jax.Array) -> RowRange:
    """All rows of a device's shard of the table."""
    first_id = lax.axis_index(MODEL) * len(item_VD)
    return RowRange(start=0, first_id=first_id, num_items=chunks.num_items)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_cross_entropy(
    chunks: Chunks,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    share_TF: jax.Array | None,
    log_extra_T: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """As `cross_entropy`, where chunks.items is smaller than the rows of a device."""
    return _forward(chunks, query_TD, item_VD, target_T, weight_T, share_TF, log_extra_T)[0]


def _forward(
    chunks: Chunks,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    share_TF: jax.Array | None,
    log_extra_T: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array | None, ...]]:
    arrays = query_TD, item_VD, target_T, share_TF, log_extra_T
    if chunks.mesh is None:
        log_sum_T, loss_T = _losses(chunks, *arrays)
    else:
        log_sum_T, loss_T = jax.shard_map(
            partial(_shard_losses, chunks),
            mesh=chunks.mesh,
            in_specs=(TOKENS, ITEMS, TOKENS, TOKENS, TOKENS),
            out_specs=(TOKENS, TOKENS),
            check_vma=False,
        )(*arrays)
    return weighted_sum(loss_T, weight_T), (*arrays, weight_T, log_sum_T, loss_T)


def _backward(
    chunks: Chunks,
    saved: tuple[jax.Array | None, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    query_TD, item_VD, target_T, share_TF, log_extra_T, weight_T, log_sum_T, loss_T = saved
    scale_T = weight_T * cotangents[0]
    arrays = query_TD, item_VD, target_T, share_TF, log_sum_T, scale_T
    if chunks.mesh is None:
        d_query_TD, d_item_VD = gradients(chunks, ALL_ITEMS, *arrays)
        d_query_TD = d_query_TD.astype(query_TD.dtype)
    else:
        d_query_TD, d_item_VD = jax.shard_map(
            partial(_shard_gradients, chunks),
            mesh=chunks.mesh,
            in_specs=(TOKENS, ITEMS, TOKENS, TOKENS, TOKENS, TOKENS),
            out_specs=(TOKENS, ITEMS),
            check_vma=False,
        )(*arrays)
    d_extra_T = None if log_extra_T is None else scale_T * jnp.exp(log_extra_T - log_sum_T)
    d_weight_T = weight_gradient(loss_T, weight_T, cotangents)
    return d_query_TD, d_item_VD, None, d_weight_T, None, d_extra_T


chunked_cross_entropy.defvjp(_forward, _backward)


def _losses(
    chunks: Chunks,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    share_TF: jax.Array | None,
    log_extra_T: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The log Z and the loss of each token, on one device."""
    target_TD = mix_items(_transform_rows(chunks, item_VD[target_T]), share_TF)
    target_score_T = rowwise(query_TD, target_TD)
    # The running maximum starts at the target's score, which is never above the maximum. This makes
    # the gather from the table an input of the loop: after the loop it would keep XLA from updating
    # the table in place, and the table would be copied.
    max_T, sum_T = softmax_sums(chunks, ALL_ITEMS, query_TD, item_VD, target_score_T)
    log_sum_T = _add_extra(max_T + jnp.log(sum_T), log_extra_T)
    return log_sum_T, log_sum_T - target_score_T


def _transform_rows(chunks: Chunks, row: jax.Array) -> jax.Array:
    """The item vectors of gathered rows, [..., D]."""
    vector = chunks.item_transform(row.reshape(-1, row.shape[-1]))
    return vector.reshape(*row.shape[:-1], -1)


def _add_extra(log_sum_T: jax.Array, log_extra_T: jax.Array | None) -> jax.Array:
    """The log Z of each token with its extra term."""
    return log_sum_T if log_extra_T is None else jnp.logaddexp(log_sum_T, log_extra_T)


def _shard_losses(
    chunks: Chunks,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    share_TF: jax.Array | None,
    log_extra_T: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`_losses` of one device's tokens over all items; T and V count its own tokens and rows.

    After the pass, devices exchange over `model` their maxima, sums and target scores, [3, T] per
    device, whatever the number of chunks.
    """
    rows = _shard_rows(chunks, item_VD)
    is_local, row = local_rows(rows.first_id, len(item_VD), target_T)
    vector = _transform_rows(chunks, item_VD[row])
    # See `_losses` for the start of the running maximum.
    if share_TF is None:
        target_score_T = jnp.where(is_local, rowwise(query_TD, vector), 0)
        start_T = jnp.where(is_local, target_score_T, LOWEST)
    else:
        target_score_T = rowwise(query_TD, mix_items(vector, jnp.where(is_local, share_TF, 0)))
        score_TF = jnp.where(is_local, rowwise(query_TD, vector), LOWEST)
        start_T = score_TF.max(axis=1)
    max_T, sum_T = softmax_sums(chunks, rows, query_TD, item_VD, start_T)
    all_M3T = lax.all_gather(jnp.stack([max_T, sum_T, target_score_T]), MODEL)
    highest_T, sum_T = merge_sums(all_M3T[:, 0], all_M3T[:, 1])
    log_sum_T = _add_extra(highest_T + jnp.log(sum_T), log_extra_T)
    return log_sum_T, log_sum_T - all_M3T[:, 2].sum(axis=0)


def _shard_gradients(
    chunks: Chunks,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    share_TF: jax.Array | None,
    log_sum_T: jax.Array,
    scale_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`gradients` of one device's tokens and rows.

    The gradient with respect to the queries, [T, D], is summed over `model`, and that with respect
    to the table rows over `data`; the derivative of `item_transform` is linear, so it may be
    applied before that sum.
    """
    rows = _shard_rows(chunks, item_VD)
    arrays = query_TD, item_VD, target_T, share_TF, log_sum_T, scale_T
    d_query_TD, d_item_VD = gradients(chunks, rows, *arrays)
    d_query_TD = psum(d_query_TD, MODEL).astype(query_TD.dtype)
    return d_query_TD, psum(d_item_VD, DATA)


def softmax_sums(
    chunks: Chunks,
    rows: RowRange,
    query_TD: jax.Array,
    item_VD: jax.Array,
    max_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The first pass: each token's highest score m, and the sum over items of exp(s - m).

    Args:
      chunks: sizes and item transform.
      rows: the rows of `item_VD` to go over.
      query_TD: [T, D].
      item_VD: table rows before the transform.
      max_T: [T] float32, finite, a lower bound of m.
    """
    T = len(query_TD)
    size = min(chunks.tokens, T) or T

    def add_items(j: jax.Array, carry: tuple) -> tuple:
        begin, _, is_new_V = _item_chunk(j, chunks.items, rows, item_VD)
        vector_VD = chunks.item_transform(*dynamic_slices(begin, chunks.items, item_VD))

        def add_tokens(i: jax.Array, carry: tuple) -> tuple:
            start, is_new_T = chunk_slice(i, size, T)
            query, max_T, sum_T = dynamic_slices(start, size, query_TD, *carry)
            logit_TV = jnp.where(is_new_V[None, :], matmul(query, vector_VD.T), -jnp.inf)
            new_T = jnp.maximum(max_T, logit_TV.max(axis=1))
            more_T = jnp.exp(logit_TV - new_T[:, None]).sum(axis=1)
            both = new_T, sum_T * jnp.exp(max_T - new_T) + more_T
            # Tokens in the overlap with an earlier chunk have these items already.
            kept = (jnp.where(is_new_T, x, old) for x, old in zip(both, (max_T, sum_T)))
            return tuple(dynamic_update_slice(x, part, start) for x, part in zip(carry, kept))

        return lax.fori_loop(0, -(-T // size), add_tokens, carry)

    iterations = -(-(len(item_VD) - rows.start) // chunks.items)
    return lax.fori_loop(0, iterations, add_items, (max_T, jnp.zeros(T)))


def gradients(
    chunks: Chunks,
    rows: RowRange,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    share_TF: jax.Array | None,
    log_sum_T: jax.Array,
    scale_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The second pass: gradients of sum_t scale_t (log Z_t - s_label), given log Z of all tokens.

    Args:
      chunks: sizes and item transform.
      rows: the rows of `item_VD` to go over; a target outside of them adds nothing.
      query_TD: [T, D].
      item_VD: table rows before the transform.
      target_T: [T] int32; [T, F] with shares.
      share_TF: [T, F] float32, or None.
      log_sum_T: [T] float32, log Z, with the extra term if there is one.
      scale_T: [T] float32.

    Returns:
      With respect to the queries, float32 [T, D], and to the table rows, in their shape and dtype.
    """
    T = len(query_TD)
    size = min(chunks.tokens, T) or T
    # Weights and overlap masks are applied to the [T, D] factors, not to [T, V].
    scale_T1 = scale_T[:, None]
    scaled_TD = (query_TD * scale_T1).astype(query_TD.dtype)

    def add_items(j: jax.Array, carry: tuple) -> tuple:
        d_query_TD, d_item_VD = carry
        begin, id_V, is_new_V = _item_chunk(j, chunks.items, rows, item_VD)
        row_VD = dynamic_slices(begin, chunks.items, item_VD)
        vector_VD, transform_vjp = jax.vjp(chunks.item_transform, *row_VD)
        new_VD = jnp.where(is_new_V[:, None], vector_VD, 0)

        def add_tokens(i: jax.Array, carry: tuple) -> tuple:
            d_query_TD, d_vector_DV = carry
            start, is_new_T = chunk_slice(i, size, T)
            arrays = query_TD, scaled_TD, target_T, share_TF, log_sum_T, d_query_TD
            query, scaled, target, share, log_sum, old = dynamic_slices(start, size, *arrays)
            logit_TV = matmul(query, vector_VD.T)
            if rows.num_items is not None:
                # Padding rows may hold any value, and inf * 0 is NaN.
                logit_TV = jnp.where(is_new_V[None, :], logit_TV, -jnp.inf)
            slope_TV = jnp.exp(logit_TV - log_sum[:, None])
            slope_TV -= _label(target, share, id_V)
            slope_TV = slope_TV.astype(query.dtype)
            new = jnp.where(is_new_T[:, None], old + matmul(slope_TV, new_VD), old)
            scaled = jnp.where(is_new_T[:, None], scaled, 0)
            d_vector_DV = d_vector_DV + matmul(scaled.T, slope_TV)
            return dynamic_update_slice(d_query_TD, new, start), d_vector_DV

        zeros = d_query_TD, jnp.zeros(vector_VD.shape[::-1])
        d_query_TD, d_vector_DV = lax.fori_loop(0, -(-T // size), add_tokens, zeros)
        (d_row_VD,) = transform_vjp(d_vector_DV.T.astype(vector_VD.dtype))
        # The gradient of a chunk is complete after all tokens, so each row is written once, in the
        # table's dtype; rows in the overlap keep the gradient of the earlier chunk.
        (old_VD,) = dynamic_slices(begin, chunks.items, d_item_VD)
        new_row_VD = jnp.where(is_new_V[:, None], d_row_VD, old_VD)
        d_item_VD = dynamic_update_slice(d_item_VD, new_row_VD, begin)
        # Row-major layout is pinned: the product above is [D, V], and XLA's layout pass for GPUs
        # would transpose the whole gradient and need two extra buffers of the table's size.
        return d_query_TD, with_layout_constraint(d_item_VD, ROW_MAJOR)

    zeros = jnp.zeros(query_TD.shape), jnp.zeros_like(item_VD)
    iterations = -(-(len(item_VD) - rows.start) // chunks.items)
    d_query_TD, d_item_VD = lax.fori_loop(0, iterations, add_items, zeros)
    return d_query_TD * scale_T1, d_item_VD


def _label(target_T: jax.Array, share_TF: jax.Array | None, id_V: jax.Array) -> jax.Array:
    """The label's share of each item of a chunk, [T, V]."""
    if share_TF is None:
        return target_T[:, None] == id_V[None, :]
    F = share_TF.shape[1]
    parts = (
        jnp.where(target_T[:, f, None] == id_V[None, :], share_TF[:, f, None], 0) for f in range(F)
    )
    return sum(parts)


def _item_chunk(
    j: jax.Array, size: int, rows: RowRange, item_VD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First row of the j-th chunk, its ids [size], and which are items of no earlier chunk."""
    offset, is_new_V = chunk_slice(j, size, len(item_VD) - rows.start)
    id_V = rows.first_id + offset + jnp.arange(size)
    if rows.num_items is not None:
        is_new_V &= (id_V > 0) & (id_V <= rows.num_items)
    return rows.start + offset, id_V, is_new_V
