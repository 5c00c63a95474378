"""Building blocks of the losses: row chunks, products, weighted sums, sums over devices."""

import jax
import jax.numpy as jnp
from jax import lax

# Start of a running maximum: below every score, and finite, so that it can be subtracted.
LOWEST = -1e30


def identity(row_VD: jax.Array) -> jax.Array:
    """Item transform of a table that already holds the item vectors."""
    return row_VD


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product in the dtype of the inputs, accumulated in float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def rowwise(query_TD: jax.Array, item: jax.Array) -> jax.Array:
    """Float32 scores of tokens and their own items: of one item [T], or of R items [T, R]."""
    letters = 'TD,TD->T' if item.ndim == 2 else 'TD,TRD->TR'
    return jnp.einsum(letters, query_TD, item, preferred_element_type=jnp.float32)


def chunk_slice(i: jax.Array, size: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Start of the i-th chunk, and a bool [size] mask of its entries that no earlier chunk covers.

    All chunks have the same size. Where the length is not a multiple of it, the last chunk overlaps
    the one before, which needs neither padding nor a copy.
    """
    start = jnp.minimum(i * size, length - size)
    return start, start + jnp.arange(size) >= i * size


def dynamic_slices(
    start: jax.Array, size: int, *arrays: jax.Array | None
) -> tuple[jax.Array | None, ...]:
    """`lax.dynamic_slice_in_dim` of the same rows of several arrays; None stays None."""
    return tuple(
        None if array is None else lax.dynamic_slice_in_dim(array, start, size) for array in arrays
    )


def dynamic_update_slice(array: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
    """`lax.dynamic_update_slice_in_dim` of rows."""
    return lax.dynamic_update_slice_in_dim(array, update, start, 0)


def mix_items(vector: jax.Array, share_TF: jax.Array | None) -> jax.Array:
    """The vectors of the labels, [T, D]: the targets' own, or mixes of F targets by their shares.

    Args:
      vector: [T, D], or [T, F, D] with shares, which gives float32.
      share_TF: float32, the shares of the targets of each label; None: one target.
    """
    if share_TF is None:
        return vector
    return jnp.einsum('TF,TFD->TD', share_TF, vector.astype(jnp.float32))


def scatter_targets(
    d_item_VD: jax.Array, row: jax.Array, d_target_TD: jax.Array, share_TF: jax.Array | None
) -> jax.Array:
    """Adds the gradient of the labels' vectors to the rows of their targets, by their shares.

    Args:
      d_item_VD: the gradient so far, float32.
      row: rows of the targets, [T], or [T, F] with shares.
      d_target_TD: the gradient with respect to `mix_items`.
      share_TF: as in `mix_items`.
    """
    if share_TF is None:
        return d_item_VD.at[row].add(d_target_TD)
    return d_item_VD.at[row].add(share_TF[:, :, None] * d_target_TD[:, None])


def replace_padding(ids: jax.Array) -> jax.Array:
    """Ids with 0, the padding, replaced by 1.

    Tokens with a padding target have weight 0; row 0 must still not be read, since it may hold any
    value and 0 * inf is NaN.
    """
    return jnp.maximum(ids, 1)


def weighted_sum(loss_T: jax.Array, weight_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the losses and the sum of the weights, both float32 scalars."""
    return (loss_T * weight_T).sum(), weight_T.sum()


def weight_gradient(
    loss_T: jax.Array, weight_T: jax.Array, cotangents: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """The gradient of `weighted_sum` with respect to the weights."""
    d_sum, d_count = cotangents
    return (loss_T * d_sum + d_count).astype(weight_T.dtype)


def scale_gradients(
    saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    """The backward pass of a loss whose forward pass has formed the gradients already.

    Args:
      saved: losses [T], weights [T], and the gradients of the weighted sum with respect to the
        queries and the item vectors.
      cotangents: of the weighted sum and of the sum of the weights.

    Returns:
      Gradients with respect to queries, item vectors, targets (None) and weights.
    """
    loss_T, weight_T, *gradients = saved
    d_query, d_item_VD = ((cotangents[0] * x).astype(x.dtype) for x in gradients)
    return d_query, d_item_VD, None, weight_gradient(loss_T, weight_T, cotangents)


def local_rows(first: jax.Array, length: int, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which ids belong to a shard of `length` rows, and their rows in it; row 0 for the others.

    Args:
      first: the id of the shard's first row.
      length: rows of the shard.
      ids: int32 ids of the whole table.
    """
    is_local = (ids >= first) & (ids < first + length)
    return is_local, jnp.where(is_local, ids - first, 0)


def psum(array: jax.Array, axis: str) -> jax.Array:
    """`lax.psum` over a mesh axis, left out where the axis has one device."""
    return array if lax.psum(1, axis) == 1 else lax.psum(array, axis)


def merge_sums(max_MT: jax.Array, sum_MT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merges the softmax sums of M devices: the maximum m, [T], and the sum of exp(s - m), [T].

    Args:
      max_MT: each device's maximum score m.
      sum_MT: each device's sum of exp(s - m), with its own m.
    """
    max_T = max_MT.max(axis=0)
    return max_T, (sum_MT * jnp.exp(max_MT - max_T[None])).sum(axis=0)
