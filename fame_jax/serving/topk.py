"""The items of highest score for a batch of histories, on one device or on a mesh."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fame_jax.evaluation import ranking
from fame_jax.parallel.mesh import DATA, MODEL

Array = jax.Array
Rows = tuple[Array, Array, Array]


# Lists of up to so many items share one program.
FEWEST = 32


def rounded_k(k: int, num_items: int) -> int:
    """K of the program that gives k items: a power of two from FEWEST on, at most V."""
    return min(max(FEWEST, 1 << (k - 1).bit_length()), num_items)


def list_lengths(k: int, num_items: int) -> list[int]:
    """All values that K has for lists of 1 to k items."""
    lengths = (min(1 << bit, k) for bit in range(k.bit_length() + 1))
    return sorted({rounded_k(length, num_items) for length in lengths})


def encode_rows(
    encode: Callable[..., Any], params: Any, rows: Rows, mesh: Mesh | None = None
) -> Any:
    """A ServedModel's `encode` or `intermediates`; one program for each shape of rows.

    Args:
      encode: (params, tokens_BL, positions_BL, segments_BL) -> arrays whose first axis is B; a
        function object has programs of its own.
      params: the first argument of `encode`.
      rows: tokens_BL, positions_BL, segments_BL, each row ending with its history.
      mesh: the devices that share the rows; None: one device.
    """
    return encoder(encode, mesh)(params, rows)


def encoder(encode: Callable[..., Any], mesh: Mesh | None = None) -> Callable[[Any, Rows], Any]:
    """The compiled form of `encode_rows`: (params, rows) -> arrays.

    It is an attribute of the function, so that the programs of a model go with the model: a server
    that loads one export after another would otherwise keep them all.
    """
    compiled = vars(encode).setdefault('_compiled', {})
    if mesh not in compiled:
        compiled.setdefault(mesh, jax.jit(partial(_encode_rows, encode, mesh)))
    return compiled[mesh]


def _encode_rows(encode: Callable[..., Any], mesh: Mesh | None, params: Any, rows: Rows) -> Any:
    if mesh is None:
        return encode(params, *rows)
    sharding = NamedSharding(mesh, _histories(mesh, len(rows[0])))
    rows = jax.lax.with_sharding_constraint(rows, sharding)
    return jax.lax.with_sharding_constraint(encode(params, *rows), sharding)


@partial(jax.jit, static_argnums=(0, 1), static_argnames='mesh')
def top_k_items(
    combine: Callable[[Array], Array],
    k: int,
    query_BQD: Array,
    item_VD: Array,
    allowed_BX: Array,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    """The k best items of each row and their scores, [B, K] each; score -inf where none is left.

    Items of equal score come in the order of their indices, so that the first items of a longer
    list are the shorter list. On a mesh each device takes the k best of its own items, and only
    these k indices and scores are exchanged along `model`.

    Args:
      combine: score_BQV -> score_BV; a function object has programs of its own.
      k: K, at most V + 1.
      query_BQD: the queries of each history.
      item_VD: item vectors, row 0 for the padding; on a mesh split over `model`, with rows past V
        that fill up.
      allowed_BX: uint8, the candidates of each row as `rows.candidate_bits` packs them.
      mesh: the devices that share the item vectors; None: one device has them all.

    Returns:
      item_BK, int32, and score_BK, float32.
    """
    if mesh is None:
        return _local_top_k(combine, k, query_BQD, item_VD, allowed_BX, first=0)

    def part(query_BQD: Array, item_VD: Array, allowed_BX: Array) -> tuple:
        first, local_k = jax.lax.axis_index(MODEL) * len(item_VD), min(k, len(item_VD))
        local = _local_top_k(combine, local_k, query_BQD, item_VD, allowed_BX, first)
        # Concatenated in the order of the devices' items, which top_k keeps among equal scores.
        item_BK, score_BK = (jax.lax.all_gather(x, MODEL, axis=1, tiled=True) for x in local)
        score_BK, place_BK = jax.lax.top_k(score_BK, k)
        return jnp.take_along_axis(item_BK, place_BK, axis=1), score_BK

    histories, items = _histories(mesh, len(query_BQD)), PartitionSpec(MODEL)
    sharded = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(histories, items, histories),
        out_specs=histories,
        check_vma=False,
    )
    return sharded(query_BQD, item_VD, allowed_BX)


def _histories(mesh: Mesh, count: int) -> PartitionSpec:
    """Rows are split over `data`; a few rows, which it cannot divide evenly, are not."""
    return PartitionSpec(DATA if count % mesh.shape[DATA] == 0 else None)


def _local_top_k(
    combine: Callable[[Array], Array],
    k: int,
    query_BQD: Array,
    item_VD: Array,
    allowed_BX: Array,
    first: int | Array,
) -> tuple[Array, Array]:
    """As `top_k_items`, of one device's items: those with indices from `first` on."""
    score_BV = ranking.scores(query_BQD, item_VD, combine)
    score_BV = jnp.where(_unpack(allowed_BX, first, len(item_VD)), score_BV, -jnp.inf)
    score_BK, column_BK = jax.lax.top_k(score_BV, k)
    return first + column_BK, score_BK


def _unpack(allowed_BX: Array, first: int | Array, count: int) -> Array:
    """The bits of items first ... first + count - 1, bool; those past the last bit are False."""
    width = count // 8 + 2
    allowed_BX = jnp.pad(allowed_BX, ((0, 0), (0, width)))
    allowed_BX = jax.lax.dynamic_slice_in_dim(allowed_BX, first // 8, width, axis=1)
    bit_BX8 = allowed_BX[:, :, None] >> jnp.arange(8, dtype=jnp.uint8)[None, None] & 1
    bit_BV = bit_BX8.reshape(len(allowed_BX), 8 * width)
    return jax.lax.dynamic_slice_in_dim(bit_BV, first % 8, count, axis=1) > 0


@partial(jax.jit, static_argnums=0)
def score_items(
    combine: Callable[[Array], Array], query_BQD: Array, item_VD: Array, item_K: Array
) -> Array:
    """The scores of some items, float32 [B, K]; see `top_k_items`."""
    return ranking.scores(query_BQD, item_VD[item_K], combine)


@partial(jax.jit, static_argnums=0)
def score_all(combine: Callable[[Array], Array], query_BQD: Array, item_VD: Array) -> Array:
    """The scores of all items, float32 [B, V + 1]; see `top_k_items`."""
    return ranking.scores(query_BQD, item_VD, combine)


@partial(jax.jit, static_argnums=0)
def similar_items(
    k: int, item_VD: Array, item_B: Array, num_items: Array, facet_DK: Array | None = None
) -> tuple[Array, Array]:
    """The k items whose vectors have the largest cosine with that of each item, itself left out.

    Args:
      k: at most V - 1.
      item_VD: item vectors, row 0 for the padding, rows past V fill up.
      item_B: int, indices of items.
      num_items: V.
      facet_DK: a head's projection W_f^h; the vectors are then the items' facet views x_v W_f^h
        (eq. 9 of arXiv 2411.01457).

    Returns:
      The indices, int32, and the cosines, float32, [B, k] each.
    """
    item_VD = item_VD.astype(jnp.float32)
    if facet_DK is not None:
        item_VD = jnp.einsum('VD,DK->VK', item_VD, facet_DK.astype(jnp.float32))
    item_VD /= jnp.maximum(jnp.linalg.norm(item_VD, axis=1, keepdims=True), 1e-12)
    cosine_BV = jnp.einsum('VD,BD->BV', item_VD, item_VD[item_B])
    index_1V = jnp.arange(len(item_VD))[None]
    other_BV = (index_1V > 0) & (index_1V <= num_items) & (index_1V != item_B[:, None])
    cosine_BK, item_BK = jax.lax.top_k(jnp.where(other_BV, cosine_BV, -jnp.inf), k)
    return item_BK, cosine_BK
