"""What the losses are put together from: chunks of rows, products, and the weighted sum."""

import jax
import jax.numpy as jnp
from jax import lax

# Below every score, and finite, so that it may be subtracted from: the maximum of no items.
LOWEST = -1e30


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """A product in the dtype that comes in, summed in float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def rowwise(query_TD: jax.Array, item: jax.Array) -> jax.Array:
    """Float32 score of each token's own item, [T, D] -> [T], or items, [T, R, D] -> [T, R]."""
    letters = 'TD,TD->T' if item.ndim == 2 else 'TD,TRD->TR'
    return jnp.einsum(letters, query_TD, item, preferred_element_type=jnp.float32)


def as_they_are(row_VD: jax.Array) -> jax.Array:
    """The vectors of a table that holds them."""
    return row_VD


def chunk_of(i: jax.Array, size: int, length: int) -> tuple[jax.Array, jax.Array]:
    """Start of the i-th chunk and, [size], which of its entries no earlier chunk has held.

    The last chunk is as long as the others and overlaps the one before, so that a length which is
    no multiple of the size needs neither padding nor a copy.
    """
    start = jnp.minimum(i * size, length - size)
    return start, start + jnp.arange(size) >= i * size


def rows(start: jax.Array, size: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """So many rows of each array."""
    return tuple(lax.dynamic_slice_in_dim(x, start, size) for x in arrays)


def put(start: jax.Array, array: jax.Array, part: jax.Array) -> jax.Array:
    """The array with rows replaced from `start` on."""
    return lax.dynamic_update_slice_in_dim(array, part, start, 0)


def real(ids: jax.Array) -> jax.Array:
    """Ids that may be read.

    Padding stands where weights are 0; row 0 is still not to be read, for 0 * inf is NaN.
    """
    return jnp.maximum(ids, 1)


def weigh(loss_T: jax.Array, weight_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The weighted sum and the sum of the weights."""
    return (loss_T * weight_T).sum(), weight_T.sum()


def d_weight(
    loss_T: jax.Array, weight_T: jax.Array, cotangents: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """The gradient of `weigh` by the weights."""
    d_sum, d_count = cotangents
    return (loss_T * d_sum + d_count).astype(weight_T.dtype)


def check_chunks(chunk_tokens: int, chunk_items: int) -> None:
    """Raises ValueError for sizes below 0."""
    if chunk_tokens < 0 or chunk_items < 0:
        raise ValueError(f'chunks must be >= 0, not {chunk_tokens} tokens and {chunk_items} items')


def own_rows(first: jax.Array, length: int, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which ids are among so many from `first` on, and their rows; row 0 for those that are not."""
    mine = (ids >= first) & (ids < first + length)
    return mine, jnp.where(mine, ids - first, 0)


def sum_over(part: jax.Array, axis: str) -> jax.Array:
    """Over the devices along an axis, if they are several."""
    return part if lax.psum(1, axis) == 1 else lax.psum(part, axis)


def put_together(max_MT: jax.Array, sum_MT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[T], the maximum m of M devices' scores and the sum of exp(s - m), from those of each."""
    max_T = max_MT.max(axis=0)
    return max_T, (sum_MT * jnp.exp(max_MT - max_T[None])).sum(axis=0)
