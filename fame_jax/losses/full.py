"""The cross-entropy over the whole catalogue, at once or a block of the logits at a time."""

from collections.abc import Callable

import jax

from fame_jax.losses.dense import dense
from fame_jax.losses.pieces import as_they_are, check_chunks, real
from fame_jax.losses.streamed import Chunks, streamed


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
    return dense(0, query_TD, item_VD, real(target_T), weight_T)


def chunked_cross_entropy(
    query_TD: jax.Array,
    item_VD: jax.Array,
    target_T: jax.Array,
    weight_T: jax.Array,
    *,
    chunk_tokens: int,
    chunk_items: int,
    num_tokens: jax.Array | None = None,
    prepare: Callable[[jax.Array], jax.Array] = as_they_are,
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
      prepare: rows of the table -> their vectors, [n, D] -> [n, D], each row by itself; with chunks
          of items it is applied to one chunk at a time, and else to the table.

    Returns:
      As `cross_entropy`.
    """
    check_chunks(chunk_tokens, chunk_items)
    target_T = real(target_T)
    if chunk_items in range(1, item_VD.shape[0] - 1):
        chunks = Chunks(chunk_tokens, chunk_items, prepare)
        return streamed(chunks, query_TD, item_VD, target_T, weight_T)
    return dense(chunk_tokens, query_TD, prepare(item_VD), target_T, weight_T, num_tokens)
