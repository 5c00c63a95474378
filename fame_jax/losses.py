"""What a recommender is trained on: plain arrays in, (sum, count) out, divided once by the caller.

Letters are those of `batch.py`, and R: negatives drawn for a token, or shared by all of them. Item
tables have V + 1 rows; row 0, the padding, is nobody's target, takes no part in any softmax and
receives no gradient. Scores are inner products of a query and a row; a cosine or a temperature is
folded into the two by the caller. Every function accepts float32 or bfloat16 queries and tables,
multiplies them as they are, and does everything after the product in float32.

`weight_T` says how much a token counts: 0 where there is nothing to predict, and only there may
`target_T` be 0. The count is the sum of the weights, so `sum / max(count, 1)` is a mean.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)


def cross_entropy(
    query_TD: jax.Array, item_VD: jax.Array, target_T: jax.Array, weight_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the softmax over the whole catalogue.

        sum_t w_t (log sum_{v=1..V} exp(q_t . x_v) - q_t . x_{y_t})

    The loss of FAME (arXiv 2411.01457, eq. 18). The gradients are formed together with the value,
    from one softmax that is never stored normalised; temporaries grow with T * V.

    Args:
      query_TD: [T, D] float32 or bfloat16.
      item_VD: [V + 1, D], the table; row 0 is the padding.
      target_T: [T] int32 in 1..V; any id where the weight is 0.
      weight_T: [T] float32, 0 for a token that does not count.

    Returns:
      The weighted sum and the sum of the weights, both float32 scalars. Gradients come in the
      dtypes of the inputs.
    """
    return _dense(0, query_TD, item_VD, _real(target_T), weight_T)


def chunked_cross_entropy(
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    *,
    chunk_tokens: int,
    chunk_items: int,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The value and the gradients of `cross_entropy`, a block of the logits at a time.

        m' = max(m, max_v s_v),  z' = z exp(m - m') + sum_v exp(s_v - m'),  log sum exp = m + log z

    with s the scores of one chunk of items (online softmax: Milakov & Gimelshein 2018, arXiv
    1805.02867; for this loss: Wijmans et al. 2024, arXiv 2411.09009). With chunks of items the
    backward pass multiplies again what the forward pass threw away, four products instead of three,
    and temporaries are chunk_tokens * chunk_items floats and a few [T, D]: they grow neither with
    T * V nor with V (on a CPU, XLA adds float32 copies of a bfloat16 table). With tokens alone in
    chunks there are three products, as in `cross_entropy`, and temporaries of chunk_tokens * V
    floats and three tables. Exact for every T and V.

    Args:
      query_TD: [T, D] float32 or bfloat16.
      item_VD: [V + 1, D], the table; row 0 is the padding.
      target_T: [T] int32 in 1..V; any id where the weight is 0.
      weight_T: [T] float32, 0 for a token that does not count.
      chunk_tokens: tokens at a time; 0, or more than there are, means all of them.
      chunk_items: items at a time; 0, or more than there are, means all of them.
      num_tokens: int32 scalar; tokens from it on must weigh nothing, and with tokens alone in
          chunks they cost nothing either. None: all of them.

    Returns:
      As `cross_entropy`.
    """
    if chunk_tokens < 0 or chunk_items < 0:
        raise ValueError(f'chunks must be >= 0, not {chunk_tokens} tokens and {chunk_items} items')
    if chunk_items in range(1, item_VD.shape[0] - 1):
        return _streamed(chunk_tokens, chunk_items, query_TD, item_VD, _real(target_T), weight_T)
    return _dense(chunk_tokens, query_TD, item_VD, _real(target_T), weight_T, num_tokens)


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
    return _combined(combine, size, query_TQD, item_VD, _real(target_T), weight_T)


def binary_cross_entropy(
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    negative_TR: jax.Array,
    weight_T: jax.Array,
    negative_weight_TR: jax.Array,
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

    Returns:
      The weighted sum and the sum of the weights, both float32 scalars.
    """
    positive_T = _rowwise(query_TD, item_VD[_real(target_T)])
    score_TR = _rowwise(query_TD, item_VD[_real(negative_TR)])
    # log(1 - sig(s)) = log sig(-s), which keeps its digits where sig(s) rounds to one.
    lost_T = -(jax.nn.log_sigmoid(-score_TR) * negative_weight_TR).sum(axis=1)
    valid_T = negative_weight_TR.sum(axis=1)
    mean_T = lost_T / jnp.where(valid_T > 0, valid_T, 1)
    return _weigh(mean_T - jax.nn.log_sigmoid(positive_T), weight_T)


def sampled_cross_entropy(
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    negative_TR: jax.Array,
    weight_T: jax.Array,
    *,
    negative_weight_TR: jax.Array | None = None,
    log_q_V: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of the softmax over the target and the negatives drawn.

        sum_t w_t (log(exp s_ty + sum_{r valid} exp s_tr) - s_ty),  s_tv = q_t . x_v - log q_v

    Sampled softmax (Jean et al. 2015, arXiv 1412.2007; as a loss for recommendation: Wu et al.
    2022, arXiv 2201.02327). A negative that is the token's own target is left out.

    Args:
      query_TD: [T, D] float32 or bfloat16.
      item_VD: [V + 1, D], the table; row 0 is the padding.
      target_T: [T] int32 in 1..V; any id where the weight is 0.
      negative_TR: [T, R] int32 in 1..V, or [R], shared by the tokens, which is one product.
      weight_T: [T] float32, 0 for a token that does not count.
      negative_weight_TR: [T, R] float32; 0 leaves a negative out, anything else keeps it.
      log_q_V: [V + 1] float32, the logarithm of the probability with which each item is drawn;
          row 0 is not read. None for uniform draws, which need no correction: it cancels.

    Returns:
      The weighted sum and the sum of the weights, both float32 scalars.
    """
    target_T, negative_TR = _real(target_T), _real(negative_TR)
    positive_T = _rowwise(query_TD, item_VD[target_T])
    if negative_TR.ndim == 1:
        score_TR = _matmul(query_TD, item_VD[negative_TR].T)
        negative_TR = jnp.broadcast_to(negative_TR, score_TR.shape)
    else:
        score_TR = _rowwise(query_TD, item_VD[negative_TR])
    if log_q_V is not None:
        log_q_V = jnp.asarray(log_q_V)
        positive_T = positive_T - log_q_V[target_T]
        score_TR = score_TR - log_q_V[negative_TR]
    valid_TR = negative_TR != target_T[:, None]
    if negative_weight_TR is not None:
        valid_TR &= negative_weight_TR != 0
    # -inf is safe under logsumexp, forwards and backwards: the target's finite score is always in.
    score_TR = jnp.where(valid_TR, score_TR, -jnp.inf)
    all_TS = jnp.concatenate([positive_T[:, None], score_TR], axis=1)
    return _weigh(jax.nn.logsumexp(all_TS, axis=1) - positive_T, weight_T)


def supervised_contrastive(
    vector_BK: jax.Array, weight_BB: jax.Array, compared_BB: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Weighted supervised contrast: each anchor against its positives among all it is compared to.

        sum_i sum_p w_ip (log sum_a exp s_ia - s_ip) / sum_p w_ip,    s_ij = z_i . z_j / temperature

    with a over all that i is compared to. L_out of Khosla et al. 2020 (arXiv 2004.11362, eq. 2), a
    weight for each positive, since labels may overlap in part. An anchor without positives
    contributes nothing and is not counted. With one positive an anchor it is InfoNCE.

    Args:
      vector_BK: [B, K] float32; of unit length there, taken as they are here.
      weight_BB: [B, B] float32 >= 0, 0 for a pair that is no positive.
      compared_BB: [B, B] bool; a pair that is not compared is neither positive nor negative. An
          anchor is never compared to itself.
      temperature: > 0.

    Returns:
      The sum over anchors and the number of anchors with a positive, both float32 scalars.
    """
    compared_BB = compared_BB & ~jnp.eye(len(vector_BK), dtype=bool)
    weight_BB = jnp.where(compared_BB, weight_BB, 0)
    logit_BB = _matmul(vector_BK, vector_BK.T) / temperature
    # A row that is compared to nothing would take the logarithm of zero, and its gradient.
    alone_B1 = ~compared_BB.any(axis=1, keepdims=True)
    heard_BB = jnp.where(compared_BB | alone_B1, logit_BB, -jnp.inf)
    lost_BB = jax.nn.logsumexp(heard_BB, axis=1, keepdims=True) - logit_BB
    total_B = weight_BB.sum(axis=1)
    loss_B = (weight_BB * lost_BB).sum(axis=1) / jnp.where(total_B > 0, total_B, 1)
    return _weigh(loss_B, (total_B > 0).astype(jnp.float32))


def two_view_contrast(
    one_BK: jax.Array, other_BK: jax.Array, real_B: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Contrast of two views of the same rows: each view against its other, among all views.

        sum over both views of (log sum_a exp s_ia - s_ip),    s_ij = z_i . z_j / temperature

    with p the other view and a over the 2 B - 1 views that are not i. NT-Xent (Chen et al. 2020,
    arXiv 2002.05709, eq. 1) of vectors as they are, not of unit length, as in CL4SRec (arXiv
    2010.14395, eq. 3), DuoRec and ICLRec.

    Args:
      one_BK: [B, K].
      other_BK: [B, K].
      real_B: [B] bool; rows that are not real are neither anchors nor compared to.
      temperature: > 0.

    Returns:
      The sum over the real views and their number, both float32 scalars.
    """
    vector_BK = jnp.concatenate([one_BK, other_BK])
    real_B = jnp.concatenate([real_B, real_B])
    other_BB = jnp.roll(jnp.eye(len(vector_BK)), len(one_BK), axis=1)
    compared_BB = real_B[:, None] & real_B[None, :]
    return supervised_contrastive(vector_BK, other_BB, compared_BB, temperature)


def label_overlap(label_BS: jax.Array) -> jax.Array:
    """Shared labels over labels of either (Jaccard), of every pair; 1 or 0 for single labels.

    Args:
      label_BS: [B, S] int32, distinct in a row, -1 for none.

    Returns:
      [B, B] float32; 0 where a row has no label.
    """
    num_B = (label_BS >= 0).sum(axis=1)
    same_BBSS = label_BS[:, None, :, None] == label_BS[None, :, None, :]
    shared_BB = (same_BBSS & (label_BS >= 0)[:, None, :, None]).sum(axis=(2, 3))
    either_BB = num_B[:, None] + num_B[None, :] - shared_BB
    return shared_BB / jnp.maximum(either_BB, 1).astype(jnp.float32)


def draw_negatives(key: jax.Array, shape: tuple[int, ...], num_items: int) -> jax.Array:
    """Item ids drawn uniformly, with replacement, from 1..num_items; int32 of the given shape."""
    return jax.random.randint(key, shape, 1, num_items + 1, jnp.int32)


# The dense form: all items at once, the gradients formed with the value. On a CPU it is bound by
# its three products; benchmarks/loss_alone.py has the alternatives it was chosen from.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dense(
    chunk: int,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    num_tokens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    # The compiler drops the gradients that nobody asks for here.
    return _dense_forward(chunk, query_TD, item_VD, target_T, weight_T, num_tokens)[0]


def _dense_block(
    query_TD: jax.Array, item_VD: jax.Array, picked_TD: jax.Array, weight_T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses [T], their gradients by the queries [T, D], and by the items, less targets [D, V]."""
    logit_TV = _matmul(query_TD, item_VD.T)
    max_T = logit_TV.max(axis=1)
    exp_TV = jnp.exp(logit_TV - max_T[:, None])
    total_T = exp_TV.sum(axis=1)
    loss_T = max_T + jnp.log(total_T) - _rowwise(query_TD, picked_TD)
    # Dividing by the total is left to the small factors, so no other pass over [T, V] is needed.
    exp_TV = exp_TV.astype(query_TD.dtype)
    d_query_TD = _matmul(exp_TV, item_VD) / total_T[:, None] - picked_TD
    scaled_TD = (query_TD * (weight_T / total_T)[:, None]).astype(query_TD.dtype)
    # The barrier keeps the transpose that will follow out of the product. XLA would fold it in, and
    # [V, T] @ [T, D] takes a CPU 1.3 times as long as [D, T] @ [T, V], 2.8 times if V is 12,288.
    return loss_T, d_query_TD, lax.optimization_barrier(_matmul(scaled_TD.T, exp_TV))


def _dense_forward(
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
            start, fresh = _chunk(i, chunk, T)
            query, picked, weight = _rows(start, chunk, query_TD, picked_TD, weight_T)
            weight = jnp.where(fresh, weight, 0)
            loss, d_query, d_item = _dense_block(query, rest_VD, picked, weight)
            # A row that was seen before is written again, with what it held.
            loss_T = lax.dynamic_update_slice_in_dim(loss_T, loss, start, 0)
            d_query_TD = lax.dynamic_update_slice_in_dim(d_query_TD, d_query, start, 0)
            return loss_T, d_query_TD, d_item_DV + d_item

        zeros = jnp.zeros(T), jnp.zeros((T, D)), jnp.zeros((D, rest_VD.shape[0]))
        # A number that only the device knows makes a loop of as many turns as it takes.
        turns = -(-(T if num_tokens is None else num_tokens) // chunk)
        loss_T, d_query_TD, d_item_DV = lax.fori_loop(0, turns, add_chunk, zeros)
    else:
        loss_T, d_query_TD, d_item_DV = _dense_block(query_TD, rest_VD, picked_TD, weight_T)
    d_query_TD = d_query_TD * weight_T[:, None]
    d_item_VD = jnp.pad(d_item_DV.T, ((1, 0), (0, 0)))
    d_item_VD = d_item_VD.at[target_T].add(-query_TD * weight_T[:, None])
    saved = loss_T, weight_T, d_query_TD.astype(query_TD.dtype), d_item_VD.astype(item_VD.dtype)
    return _weigh(loss_T, weight_T), saved


def _dense_backward(
    chunk: int, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    loss_T, weight_T, d_query_TD, d_item_VD = saved
    scale, _ = cotangents
    d_query_TD, d_item_VD = ((scale * x).astype(x.dtype) for x in (d_query_TD, d_item_VD))
    return d_query_TD, d_item_VD, None, _d_weight(loss_T, weight_T, cotangents), None


_dense.defvjp(_dense_forward, _dense_backward)


# The combined form: several queries a token, the gradients formed with the value as in the dense.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _combined(
    combine: Callable[[jax.Array], jax.Array],
    chunk: int,
    query_TQD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return _combined_forward(combine, chunk, query_TQD, item_VD, target_T, weight_T)[0]


def _combined_block(
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
    score_SV = _matmul(query_SD, item_VD.T)
    score_TV, pull = jax.vjp(combine, score_SV.reshape(T, Q, -1))
    max_T = score_TV.max(axis=1)
    exp_TV = jnp.exp(score_TV - max_T[:, None])
    total_T = exp_TV.sum(axis=1)
    here = jnp.arange(T), target_T - 1
    loss_T = max_T + jnp.log(total_T) - score_TV[here]
    d_score_TV = (exp_TV * (weight_T / total_T)[:, None]).at[here].add(-weight_T)
    d_score_SV = pull(d_score_TV)[0].reshape(score_SV.shape).astype(query_TQD.dtype)
    d_query_TQD = _matmul(d_score_SV, item_VD).reshape(query_TQD.shape)
    # The barrier is that of `_dense_block`.
    return loss_T, d_query_TQD, lax.optimization_barrier(_matmul(query_SD.T, d_score_SV))


def _combined_forward(
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
        start, fresh = _chunk(i, chunk, T)
        query, target, weight = _rows(start, chunk, query_TQD, target_T, weight_T)
        loss, d_query, d_item = _combined_block(
            combine, query, rest_VD, target, jnp.where(fresh, weight, 0)
        )
        # A token that was seen before has no weight now; what it got then is added to nothing.
        (old,) = _rows(start, chunk, d_query_TQD)
        loss_T = lax.dynamic_update_slice_in_dim(loss_T, loss, start, 0)
        d_query_TQD = lax.dynamic_update_slice_in_dim(d_query_TQD, old + d_query, start, 0)
        return loss_T, d_query_TQD, d_item_DV + d_item

    zeros = jnp.zeros(T), jnp.zeros(query_TQD.shape), jnp.zeros((D, rest_VD.shape[0]))
    loss_T, d_query_TQD, d_item_DV = lax.fori_loop(0, -(-T // chunk), add_chunk, zeros)
    d_item_VD = jnp.pad(d_item_DV.T, ((1, 0), (0, 0)))
    saved = loss_T, weight_T, d_query_TQD.astype(query_TQD.dtype), d_item_VD.astype(item_VD.dtype)
    return _weigh(loss_T, weight_T), saved


def _combined_backward(
    combine: Callable[[jax.Array], jax.Array],
    chunk: int,
    saved: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    return _dense_backward(chunk, saved, cotangents)[:4]


_combined.defvjp(_combined_forward, _combined_backward)


# The streamed form: a chunk of tokens by a chunk of items at a time, multiplied again in the
# backward pass.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _streamed(
    chunk_T: int,
    chunk_V: int,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    return _streamed_forward(chunk_T, chunk_V, query_TD, item_VD, target_T, weight_T)[0]


def _streamed_forward(
    chunk_T: int,
    chunk_V: int,
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    T, V = query_TD.shape[0], item_VD.shape[0] - 1
    size = min(chunk_T, T) or T

    def log_sum_exp(i: jax.Array, total_T: jax.Array) -> jax.Array:
        start, _ = _chunk(i, size, T)
        (query,) = _rows(start, size, query_TD)

        def add_items(j: jax.Array, carry: tuple) -> tuple:
            max_T, sum_T = carry
            first, fresh_V = _chunk(j, chunk_V, V)
            (item,) = _rows(1 + first, chunk_V, item_VD)
            logit_TV = jnp.where(fresh_V[None, :], _matmul(query, item.T), -jnp.inf)
            # Finite from the first chunk on: every chunk holds an item that is new.
            new_T = jnp.maximum(max_T, logit_TV.max(axis=1))
            sum_T = sum_T * jnp.exp(max_T - new_T) + jnp.exp(logit_TV - new_T[:, None]).sum(axis=1)
            return new_T, sum_T

        zero = jnp.full(size, -jnp.inf), jnp.zeros(size)
        max_T, sum_T = lax.fori_loop(0, -(-V // chunk_V), add_items, zero)
        return lax.dynamic_update_slice_in_dim(total_T, max_T + jnp.log(sum_T), start, 0)

    total_T = lax.fori_loop(0, -(-T // size), log_sum_exp, jnp.zeros(T))
    loss_T = total_T - _rowwise(query_TD, item_VD[target_T])
    saved = query_TD, item_VD, target_T, weight_T, total_T, loss_T
    return _weigh(loss_T, weight_T), saved


def _streamed_backward(
    chunk_T: int,
    chunk_V: int,
    saved: tuple[jax.Array, ...],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    query_TD, item_VD, target_T, weight_T, total_T, loss_T = saved
    T, V = query_TD.shape[0], item_VD.shape[0] - 1
    size = min(chunk_T, T) or T
    scale_T = weight_T * cotangents[0]

    def add_items(j: jax.Array, carry: tuple) -> tuple:
        d_query_TD, d_item_VD = carry
        first, fresh_V = _chunk(j, chunk_V, V)
        (item,) = _rows(1 + first, chunk_V, item_VD)
        ids_V = 1 + first + jnp.arange(chunk_V, dtype=target_T.dtype)

        def add_tokens(i: jax.Array, carry: tuple) -> tuple:
            d_query_TD, d_item_DV = carry
            start, fresh_T = _chunk(i, size, T)
            query, target, scale, total = _rows(start, size, query_TD, target_T, scale_T, total_T)
            scale = jnp.where(fresh_T, scale, 0)
            d_logit_TV = jnp.exp(_matmul(query, item.T) - total[:, None])
            d_logit_TV -= target[:, None] == ids_V[None, :]
            d_logit_TV = jnp.where(fresh_V[None, :], d_logit_TV * scale[:, None], 0)
            d_logit_TV = d_logit_TV.astype(query.dtype)
            (old,) = _rows(start, size, d_query_TD)
            new = old + _matmul(d_logit_TV, item)
            d_query_TD = lax.dynamic_update_slice_in_dim(d_query_TD, new, start, 0)
            return d_query_TD, d_item_DV + _matmul(query.T, d_logit_TV)

        zero = d_query_TD, jnp.zeros(item.shape[::-1])
        d_query_TD, d_item_DV = lax.fori_loop(0, -(-T // size), add_tokens, zero)
        # A chunk's rows are whole after all the tokens, so the table is written once, in its own
        # dtype; rows of an earlier chunk keep what they have.
        (old,) = _rows(1 + first, chunk_V, d_item_VD)
        new = jnp.where(fresh_V[:, None], d_item_DV.T.astype(old.dtype), old)
        return d_query_TD, lax.dynamic_update_slice_in_dim(d_item_VD, new, 1 + first, 0)

    zeros = jnp.zeros(query_TD.shape), jnp.zeros_like(item_VD)
    d_query_TD, d_item_VD = lax.fori_loop(0, -(-V // chunk_V), add_items, zeros)
    d_query_TD = d_query_TD.astype(query_TD.dtype)
    return d_query_TD, d_item_VD, None, _d_weight(loss_T, weight_T, cotangents)


_streamed.defvjp(_streamed_forward, _streamed_backward)


def _chunk(i: jax.Array, size: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Start of the i-th chunk and, [size], which of its entries no earlier chunk has held.

    The last chunk is as long as the others and overlaps the one before, so that a length which is
    no multiple of the size needs neither padding nor a copy.
    """
    start = jnp.minimum(i * size, length - size)
    return start, start + jnp.arange(size) >= i * size


def _rows(start: jax.Array, size: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(lax.dynamic_slice_in_dim(x, start, size) for x in arrays)


def _rowwise(query_TD: jax.Array, item: jax.Array) -> jax.Array:
    """Float32 score of each token's own item, [T, D] -> [T], or items, [T, R, D] -> [T, R]."""
    letters = 'TD,TD->T' if item.ndim == 2 else 'TD,TRD->TR'
    return jnp.einsum(letters, query_TD, item, preferred_element_type=jnp.float32)


def _real(ids: jax.Array) -> jax.Array:
    # Padding stands where weights are 0; row 0 is still not to be read, for 0 * inf is NaN.
    return jnp.maximum(ids, 1)


def _weigh(loss_T: jax.Array, weight_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (loss_T * weight_T).sum(), weight_T.sum()


def _d_weight(
    loss_T: jax.Array, weight_T: jax.Array, cotangents: tuple[jax.Array, jax.Array]
) -> jax.Array:
    d_sum, d_count = cotangents
    return (loss_T * d_sum + d_count).astype(weight_T.dtype)
