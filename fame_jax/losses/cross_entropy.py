"""Cross-entropy over the whole catalogue: `cross_entropy`, which chooses among four forms.

The forms differ in memory and in the devices that they use, and compute the same value:

    mesh  chunk_items   form                                                        where
    no    no            dense: gradients formed together with the value             here
    yes   no            dense, tokens split over `data` and items over `model`      here
    no    yes           chunked: items in chunks too, and never a second table      chunked.py
    yes   yes           chunked, split over the mesh                                chunked.py

One device is not treated as a mesh of one: on a CPU the sharded dense form takes 1.1 times as long
there with chunks of 128 tokens, and 1.7 times with all tokens at once (value and gradients, T 512,
V 12,000, D 64, float32).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from fame_jax.losses.chunked import Chunks, chunked_cross_entropy
from fame_jax.losses.ops import (
    LOWEST,
    chunk_slice,
    dynamic_slices,
    dynamic_update_slice,
    identity,
    local_rows,
    matmul,
    merge_sums,
    mix_items,
    psum,
    replace_padding,
    rowwise,
    scale_gradients,
    scatter_targets,
    weighted_sum,
)
from fame_jax.parallel.mesh import DATA, MODEL


def cross_entropy(
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    *,
    share_TF: jax.Array | None = None,
    log_extra_T: jax.Array | None = None,
    chunk_tokens: int = 0,
    chunk_items: int = 0,
    mesh: Mesh | None = None,
    num_items: int | None = None,
    num_tokens: jax.Array | None = None,
    item_transform: Callable[[jax.Array], jax.Array] = identity,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the softmax over the whole catalogue.

        sum_t w_t (log sum_{v=1..V} exp(q_t . x_v) - q_t . x_{y_t})

    The loss of FAME (arXiv 2411.01457, eq. 18), exact for every T and V. With soft labels, a mix of
    F targets, and with a further term in the sum of exponentials it is

        sum_t w_t (log(sum_{v=1..V} exp(q_t . x_v) + exp(e_t)) - sum_f a_tf q_t . x_{y_tf})

    which differs from the cross-entropy of the soft label by the label's entropy, a constant.

    Memory and products, on one device:

    - No chunks: the gradients are formed together with the value, from one softmax that is never
      stored normalised. Three products; temporaries grow with T * V.
    - Chunks of tokens: three products; chunk_tokens * V floats and three tables.
    - Chunks of items: four products, since the backward pass repeats that of the forward pass;
      temporaries are chunk_tokens * chunk_items floats and a few [T, D], and grow neither with
      T * V nor with V (on a CPU, XLA adds float32 copies of a bfloat16 table). The softmax is
      accumulated over chunks (online softmax: Milakov & Gimelshein 2018, arXiv 1805.02867; for this
      loss: Wijmans et al. 2024, arXiv 2411.09009):

        m' = max(m, max_v s_v),  z' = z exp(m - m') + sum_v exp(s_v - m'),  log sum exp = m + log z

    With a mesh, tokens are split over `data` and items over `model` (vocabulary-parallel
    cross-entropy: Shoeybi et al. 2019, arXiv 1909.08053, section 3). Chunk sizes are then those of
    one device. No array as long as the table is sent, and no device holds the whole table. With
    chunks of items a device needs one more gradient of its rows while it is summed over `data`.

    Args:
      query_TD: [T, D] float32 or bfloat16; with a mesh split over `data`, T a multiple of it.
      item_VD: the item table, [V + 1, D] with row 0 for the padding; with a mesh split over
        `model`, and it may have further padding rows past V.
      target_T: [T] int32 in 1..V; any id where the weight is 0. With `share_TF`: [T, F].
      weight_T: [T] float32, 0 for a token that does not count.
      share_TF: [T, F] float32, the shares a of the targets of each label, which sum to 1; the id of
        a target without a share may be any; None: one target.
      log_extra_T: [T] float32, e; at most a few tens above the token's highest score. It has a
        gradient. None: no such term.
      chunk_tokens: tokens per chunk; 0, or more than T: all tokens at once.
      chunk_items: items per chunk; 0, or more than V: all items at once.
      mesh: the devices, with axes `data` and `model`; None: one device.
      num_items: V; needed with a mesh, where it tells items from padding rows, else ignored.
      num_tokens: int32 scalar: tokens from this index on have weight 0. The dense form on one
        device then skips the chunks without a token that counts; the other forms ignore it.
      item_transform: table rows -> item vectors, [n, D] -> [n, D], each row on its own. With chunks
        of items it is applied to one chunk at a time, otherwise to the table.

    Returns:
      The weighted sum and the sum of the weights, both float32 scalars. Gradients have the dtypes
      of the inputs.

    Raises:
      ValueError: for a negative chunk size, or for a mesh without `num_items`.
    """
    if chunk_tokens < 0 or chunk_items < 0:
        raise ValueError(f'chunks must be >= 0, not {chunk_tokens} tokens and {chunk_items} items')
    if mesh is None:
        num_items = None
        num_rows = len(item_VD) - 1
    elif num_items is None:
        raise ValueError('a mesh needs num_items, since its tables have padding rows')
    else:
        num_rows = len(item_VD) // mesh.shape[MODEL]
    labels = replace_padding(target_T), weight_T, share_TF, log_extra_T
    if 0 < chunk_items < num_rows:
        chunks = Chunks(chunk_tokens, chunk_items, item_transform, mesh, num_items)
        return chunked_cross_entropy(chunks, query_TD, item_VD, *labels)
    form = Dense(chunk_tokens, mesh, num_items)
    return _dense(form, query_TD, item_transform(item_VD), *labels, num_tokens)


class Dense(NamedTuple):
    """Static options of the dense form, as `cross_entropy` has them."""

    chunk_tokens: int
    mesh: Mesh | None
    num_items: int | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(
    form: Dense,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    share_TF: jax.Array | None,
    log_extra_T: jax.Array | None,
    num_tokens: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    # XLA removes the gradients where only the value is needed.
    arrays = query_TD, item_VD, target_T, weight_T, share_TF, log_extra_T
    return _forward(form, *arrays, num_tokens)[0]


def _forward(
    form: Dense,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    share_TF: jax.Array | None,
    log_extra_T: jax.Array | None,
    num_tokens: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array | None, ...]]:
    arrays = query_TD, item_VD, target_T, weight_T, share_TF, log_extra_T
    if form.mesh is None:
        loss_T, slope_T, *gradients = _one_device(form.chunk_tokens, *arrays, num_tokens)
    else:
        tokens, items = PartitionSpec(DATA), PartitionSpec(MODEL)
        loss_T, slope_T, *gradients = jax.shard_map(
            partial(_one_shard, form.chunk_tokens, form.num_items),
            mesh=form.mesh,
            in_specs=(tokens, items, tokens, tokens, tokens, tokens),
            out_specs=(tokens, tokens, tokens, items),
            check_vma=False,
        )(*arrays)
    return weighted_sum(loss_T, weight_T), (slope_T, loss_T, weight_T, *gradients)


def _one_device(
    chunk_tokens: int,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    share_TF: jax.Array | None,
    log_extra_T: jax.Array | None,
    num_tokens: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """Losses [T], and the weighted gradients with respect to extra terms, queries and items."""
    T, D = query_TD.shape
    # Row 0 is cut off: masking its column would need a second [T, V] buffer.
    rest_VD = item_VD[1:]
    target_TD = mix_items(item_VD[target_T], share_TF)
    if 0 < chunk_tokens < T:

        def add_chunk(i: jax.Array, carry: tuple) -> tuple:
            loss_T, slope_T, d_query_TD, d_item_DV = carry
            start, is_new = chunk_slice(i, chunk_tokens, T)
            query, target, weight, log_extra = dynamic_slices(
                start, chunk_tokens, query_TD, target_TD, weight_T, log_extra_T
            )
            weight = jnp.where(is_new, weight, 0)
            loss, slope, d_query, d_item = _block(query, rest_VD, target, weight, log_extra)
            # Tokens in the overlap get the same values again.
            loss_T = dynamic_update_slice(loss_T, loss, start)
            if slope is not None:
                slope_T = dynamic_update_slice(slope_T, slope, start)
            d_query_TD = dynamic_update_slice(d_query_TD, d_query, start)
            return loss_T, slope_T, d_query_TD, d_item_DV + d_item

        slope_T = None if log_extra_T is None else jnp.zeros(T)
        zeros = jnp.zeros(T), slope_T, jnp.zeros((T, D)), jnp.zeros((D, rest_VD.shape[0]))
        # With num_tokens the number of iterations is known on the device only.
        iterations = -(-(T if num_tokens is None else num_tokens) // chunk_tokens)
        loss_T, slope_T, d_query_TD, d_item_DV = lax.fori_loop(0, iterations, add_chunk, zeros)
    else:
        loss_T, slope_T, d_query_TD, d_item_DV = _block(
            query_TD, rest_VD, target_TD, weight_T, log_extra_T
        )
    if slope_T is not None:
        slope_T = slope_T * weight_T
    d_query_TD = d_query_TD * weight_T[:, None]
    d_item_VD = jnp.pad(d_item_DV.T, ((1, 0), (0, 0)))
    d_item_VD = scatter_targets(d_item_VD, target_T, -query_TD * weight_T[:, None], share_TF)
    return loss_T, slope_T, d_query_TD.astype(query_TD.dtype), d_item_VD.astype(item_VD.dtype)


def _block(
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_TD: jax.Array,
    weight_T: jax.Array,
    log_extra_T: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """Losses and gradients of tokens against all items.

    Returns:
      Losses [T]; their gradients by the extra terms [T] and by the queries [T, D]; the weighted
      gradient by the items without the targets' part [D, V].
    """
    logit_TV = matmul(query_TD, item_VD.T)
    max_T = logit_TV.max(axis=1)
    exp_TV = jnp.exp(logit_TV - max_T[:, None])
    sum_T, slope_T = exp_TV.sum(axis=1), None
    if log_extra_T is not None:
        extra_T = jnp.exp(log_extra_T - max_T)
        sum_T += extra_T
        slope_T = extra_T / sum_T
    loss_T = max_T + jnp.log(sum_T) - rowwise(query_TD, target_TD)
    # The division by the sum is applied to the [T, D] factors, which saves a pass over [T, V].
    exp_TV = exp_TV.astype(query_TD.dtype)
    d_query_TD = matmul(exp_TV, item_VD) / sum_T[:, None] - target_TD
    scaled_TD = (query_TD * (weight_T / sum_T)[:, None]).astype(query_TD.dtype)
    # The barrier keeps the transpose that follows out of the product. XLA would fold it in, and on
    # a CPU [V, T] @ [T, D] takes 1.3 times as long as [D, T] @ [T, V], 2.8 times if V is 12,288.
    d_item_DV = lax.optimization_barrier(matmul(scaled_TD.T, exp_TV))
    return loss_T, slope_T, d_query_TD, d_item_DV


def _one_shard(
    chunk_tokens: int,
    num_items: int,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    share_TF: jax.Array | None,
    log_extra_T: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """`_one_device` for one device of a mesh; T and V count its own tokens and rows.

    Devices exchange over `model`: the target vectors [T, D], the softmax's maxima and sums of each
    chunk, [2, T] per device, and the gradient with respect to the queries [T, D]; over `data`: the
    gradient with respect to a device's rows.
    """
    (T, D), V = query_TD.shape, len(item_VD)
    first = lax.axis_index(MODEL) * V
    id_V = first + jnp.arange(V)
    is_item_1V = ((id_V > 0) & (id_V <= num_items))[None, :]
    is_local, row = local_rows(first, V, target_T)
    local = jnp.where(is_local[..., None], item_VD[row], 0)
    target_TD = psum(mix_items(local, share_TF), MODEL)
    size = min(chunk_tokens, T) or T

    def add_chunk(i: jax.Array, carry: tuple) -> tuple:
        loss_T, slope_T, d_query_TD, d_item_DV = carry
        start, is_new = chunk_slice(i, size, T)
        query, target, weight, log_extra = dynamic_slices(
            start, size, query_TD, target_TD, weight_T, log_extra_T
        )
        logit_TV = jnp.where(is_item_1V, matmul(query, item_VD.T), -jnp.inf)
        # A shard of padding rows alone has no finite maximum, and inf - inf is NaN.
        max_T = jnp.maximum(logit_TV.max(axis=1), LOWEST)
        exp_TV = jnp.exp(logit_TV - max_T[:, None])
        all_M2T = lax.all_gather(jnp.stack([max_T, exp_TV.sum(axis=1)]), MODEL)
        highest_T, sum_T = merge_sums(all_M2T[:, 0], all_M2T[:, 1])
        if log_extra is not None:
            extra_T = jnp.exp(log_extra - highest_T)
            sum_T += extra_T
            slope_T = dynamic_update_slice(slope_T, extra_T / sum_T, start)
        factor_T = jnp.exp(max_T - highest_T) / sum_T
        exp_TV = exp_TV.astype(query.dtype)
        d_query = matmul(exp_TV, item_VD) * factor_T[:, None]
        scaled = query * (jnp.where(is_new, weight, 0) * factor_T)[:, None]
        d_item = matmul(scaled.astype(query.dtype).T, exp_TV)
        loss = highest_T + jnp.log(sum_T) - rowwise(query, target)
        loss_T = dynamic_update_slice(loss_T, loss, start)
        d_query_TD = dynamic_update_slice(d_query_TD, d_query, start)
        return loss_T, slope_T, d_query_TD, d_item_DV + d_item

    slope_T = None if log_extra_T is None else jnp.zeros(T)
    zeros = jnp.zeros(T), slope_T, jnp.zeros((T, D)), jnp.zeros((D, V))
    loss_T, slope_T, d_query_TD, d_item_DV = lax.fori_loop(0, -(-T // size), add_chunk, zeros)
    if slope_T is not None:
        slope_T = slope_T * weight_T
    d_query_TD = (psum(d_query_TD, MODEL) - target_TD) * weight_T[:, None]
    scale_T1 = -weight_T[:, None]
    if share_TF is None:
        d_target_TD = jnp.where(is_local[:, None], query_TD * scale_T1, 0)
        d_item_VD = d_item_DV.T.at[row].add(d_target_TD)
    else:
        local_share_TF = jnp.where(is_local, share_TF, 0)
        d_item_VD = scatter_targets(d_item_DV.T, row, query_TD * scale_T1, local_share_TF)
    d_item_VD = psum(d_item_VD, DATA)
    return loss_T, slope_T, d_query_TD.astype(query_TD.dtype), d_item_VD.astype(item_VD.dtype)


def _backward(
    form: Dense, saved: tuple[jax.Array | None, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    slope_T, *rest = saved
    d_extra_T = None if slope_T is None else cotangents[0] * slope_T
    return *scale_gradients(rest, cotangents), None, d_extra_T, None


_dense.defvjp(_forward, _backward)
