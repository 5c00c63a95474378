"""The streamed form: the cross-entropy over all items, a chunk of them at a time.

Two passes over the table, each chunk of which is read and prepared once in a pass. The first has
one product and leaves log Z; the second multiplies again and forms both gradients, three products.
Three in all would do only if a chunk's gradient could be formed before log Z is known, and it
cannot: it is a sum over tokens of exp(s) / Z times a query, and each token has a Z of its own.

The passes go over the rows that a device has: all but the padding here, a part of the table in
`divided_streamed`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from fame_jax.losses.pieces import chunk_of, d_weight, matmul, put, rows, rowwise, weigh

BY_ROWS = Layout((0, 1))


class Chunks(NamedTuple):
    """What is held at a time; static.

    Attributes:
      tokens: so many; 0: all.
      items: so many, no more than there are rows.
      prepare: rows of the table -> their vectors, as `chunked_cross_entropy` has it.
    """

    tokens: int
    items: int
    prepare: Callable[[jax.Array], jax.Array]


class Span(NamedTuple):
    """Which rows of a table are gone through, and whose they are.

    Attributes:
      start: the first of them; those before are never read.
      first: the id of that one, an int or an int32 scalar.
      num_items: V; rows of id 0 and of ids past V are nobody's. None: all are somebody's.
    """

    start: int
    first: jax.Array | int
    num_items: int | None


WHOLE = Span(start=1, first=1, num_items=None)


def _chunk(
    j: jax.Array, size: int, which: Span, item_VD: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the j-th chunk starts; [size], its ids, and which are items that are not done yet."""
    first, fresh_V = chunk_of(j, size, len(item_VD) - which.start)
    id_V = which.first + first + jnp.arange(size)
    if which.num_items is not None:
        fresh_V &= (id_V > 0) & (id_V <= which.num_items)
    return which.start + first, id_V, fresh_V


def add_up(
    chunks: Chunks,
    which: Span,
    query_TD: jax.Array,
    item_VD: jax.Array,
    max_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The first pass: each token's greatest score m, and the sum of all items' exp(s - m).

    Args:
      chunks: what is held at a time.
      which: rows of `item_VD` to go through.
      query_TD: [T, D].
      item_VD: raw rows.
      max_T: [T] float32, what m is to be at the least, finite.
    """
    T = len(query_TD)
    size, chunk_V, prepare = min(chunks.tokens, T) or T, chunks.items, chunks.prepare

    def add_items(j: jax.Array, carry: tuple) -> tuple:
        begin, _, fresh_V = _chunk(j, chunk_V, which, item_VD)
        vector_VD = prepare(*rows(begin, chunk_V, item_VD))

        def add_tokens(i: jax.Array, carry: tuple) -> tuple:
            start, fresh_T = chunk_of(i, size, T)
            query, max_T, sum_T = rows(start, size, query_TD, *carry)
            logit_TV = jnp.where(fresh_V[None, :], matmul(query, vector_VD.T), -jnp.inf)
            new_T = jnp.maximum(max_T, logit_TV.max(axis=1))
            more_T = jnp.exp(logit_TV - new_T[:, None]).sum(axis=1)
            both = new_T, sum_T * jnp.exp(max_T - new_T) + more_T
            # A token that an earlier chunk has held knows these items already.
            kept = (jnp.where(fresh_T, x, old) for x, old in zip(both, (max_T, sum_T)))
            return tuple(put(start, x, part) for x, part in zip(carry, kept))

        return lax.fori_loop(0, -(-T // size), add_tokens, carry)

    turns = -(-(len(item_VD) - which.start) // chunk_V)
    return lax.fori_loop(0, turns, add_items, (max_T, jnp.zeros(T)))


def differentiate(
    chunks: Chunks,
    which: Span,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    total_T: jax.Array,
    scale_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The second pass: the gradients of sum_t scale_t (log Z_t - s_target), given every log Z.

    Args:
      chunks: what is held at a time.
      which: rows of `item_VD` to go through; a target that is not among them adds nothing.
      query_TD: [T, D].
      item_VD: raw rows.
      target_T: [T] int32.
      total_T: [T] float32, log Z.
      scale_T: [T] float32.

    Returns:
      By the queries, [T, D] float32, and by the raw rows, in their shape and dtype.
    """
    T = len(query_TD)
    size, chunk_V, prepare = min(chunks.tokens, T) or T, chunks.items, chunks.prepare
    # Weights, and what is not to be counted twice, go into the small factors and not over [T, V].
    scale_T1 = scale_T[:, None]
    scaled_TD = (query_TD * scale_T1).astype(query_TD.dtype)

    def add_items(j: jax.Array, carry: tuple) -> tuple:
        d_query_TD, d_item_VD = carry
        begin, id_V, fresh_V = _chunk(j, chunk_V, which, item_VD)
        vector_VD, pull = jax.vjp(prepare, *rows(begin, chunk_V, item_VD))
        fresh_VD = jnp.where(fresh_V[:, None], vector_VD, 0)

        def add_tokens(i: jax.Array, carry: tuple) -> tuple:
            d_query_TD, d_vector_DV = carry
            start, fresh_T = chunk_of(i, size, T)
            parts = rows(start, size, query_TD, scaled_TD, target_T, total_T, d_query_TD)
            query, scaled, target, total, old = parts
            logit_TV = matmul(query, vector_VD.T)
            if which.num_items is not None:
                # What is nobody's may be of any size, and inf * 0 is NaN.
                logit_TV = jnp.where(fresh_V[None, :], logit_TV, -jnp.inf)
            slope_TV = jnp.exp(logit_TV - total[:, None])
            slope_TV -= target[:, None] == id_V[None, :]
            slope_TV = slope_TV.astype(query.dtype)
            new = jnp.where(fresh_T[:, None], old + matmul(slope_TV, fresh_VD), old)
            scaled = jnp.where(fresh_T[:, None], scaled, 0)
            return put(start, d_query_TD, new), d_vector_DV + matmul(scaled.T, slope_TV)

        zero = d_query_TD, jnp.zeros(vector_VD.shape[::-1])
        d_query_TD, d_vector_DV = lax.fori_loop(0, -(-T // size), add_tokens, zero)
        (d_row_VD,) = pull(d_vector_DV.T.astype(vector_VD.dtype))
        # A chunk's rows are whole after all the tokens, so the table is written once, in its own
        # dtype; rows of an earlier chunk keep what they have.
        new = jnp.where(fresh_V[:, None], d_row_VD, *rows(begin, chunk_V, d_item_VD))
        # The product above is [D, V], and a compiler for a GPU would rather have the whole gradient
        # lie so too; then it turns it in the end, which takes two more tables.
        return d_query_TD, with_layout_constraint(put(begin, d_item_VD, new), BY_ROWS)

    zeros = jnp.zeros(query_TD.shape), jnp.zeros_like(item_VD)
    turns = -(-(len(item_VD) - which.start) // chunk_V)
    d_query_TD, d_item_VD = lax.fori_loop(0, turns, add_items, zeros)
    return d_query_TD * scale_T1, d_item_VD


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def streamed(
    chunks: Chunks,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """As `chunked_cross_entropy`, where chunks.items is smaller than V."""
    return _forward(chunks, query_TD, item_VD, target_T, weight_T)[0]


def _forward(
    chunks: Chunks,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    picked_T = rowwise(query_TD, chunks.prepare(item_VD[target_T]))
    # The target is among the items, so its score is no more than the maximum. To begin with it puts
    # the last look at the table before all that follows from log Z. Were the target looked up
    # beside the loop, an optimizer could not write over the table, and XLA would copy it first.
    max_T, sum_T = add_up(chunks, WHOLE, query_TD, item_VD, picked_T)
    total_T = max_T + jnp.log(sum_T)
    loss_T = total_T - picked_T
    saved = query_TD, item_VD, target_T, weight_T, total_T, loss_T
    return weigh(loss_T, weight_T), saved


def _backward(
    chunks: Chunks,
    saved: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    query_TD, item_VD, target_T, weight_T, total_T, loss_T = saved
    scale_T = weight_T * cotangents[0]
    data = query_TD, item_VD, target_T, total_T, scale_T
    d_query_TD, d_item_VD = differentiate(chunks, WHOLE, *data)
    d_query_TD = d_query_TD.astype(query_TD.dtype)
    return d_query_TD, d_item_VD, None, d_weight(loss_T, weight_T, cotangents)


streamed.defvjp(_forward, _backward)
