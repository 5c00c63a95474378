"""The rank of each user's target among all items.

Two protocols from one pass over the items. Unmasked: the rank among all items. Masked: items that
are already in the user's history get the score -inf. In both a tie counts against the target, the
padding is not an item, and a NaN anywhere is an error.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fame_jax.parallel.mesh import DATA, MODEL, host_to_device, process_rows

Array = jax.Array

# `scores` multiplies so many queries at a time before it combines those of a user.
QUERIES_AT_A_TIME = 1024

# Where the scores of a batch would take more than the first, items are scored in blocks of about
# the second: a block stays in a CPU's cache, and two passes over it are faster than one over all.
SCORES_AT_ONCE, SCORES_IN_BLOCK = 2**28, 2**24  # bytes

# The host prepares at most so many batches before it waits for the first one's ranks.
BATCHES_AHEAD = 8


class Ranks(NamedTuple):
    """The ranks of all users' targets, 1 is best; int32 [U] each, in the order of users."""

    masked: np.ndarray
    unmasked: np.ndarray


class Rows(NamedTuple):
    """The fields of an `EvalBatch` that ranking needs on the devices."""

    tokens_BL: Any
    positions_BL: Any
    segments_BL: Any
    seen_BS: Any
    target_B: Any


def rank(
    score_BV: Array,
    target_B: Array,
    seen_BS: Array,
    *,
    num_items: int | None = None,
    first_id: int | Array = 0,
    psum: Callable[[Array], Array] = lambda local: local,
) -> tuple[Array, Array, Array]:
    """Ranks one target per row.

    The masked rank is the unmasked rank minus the number of seen items that score at least as high
    as the target, which is exact and saves a second pass over V. A target that is itself a seen
    item scores -inf under masking, so its masked rank is V.

    Args:
      score_BV: float scores of the items from `first_id` on; id 0 and ids past V are padding.
      target_B: int32 ids.
      seen_BS: int32 ids, distinct in a row, padded with 0.
      num_items: V; None: score_BV has V + 1 columns.
      first_id: the id of the first column; on one device 0.
      psum: sums an array over the devices that share the items; on one device the identity.

    Returns:
      masked_B and unmasked_B, int32, and is_nan_B, bool: whether an item's score is NaN.
    """
    if num_items is None:
        num_items = score_BV.shape[1] - 1
    id_1V = (first_id + jnp.arange(score_BV.shape[1]))[None, :]
    is_item_1V = (id_1V > 0) & (id_1V <= num_items)

    def scores_of(id_BS: Array) -> Array:
        column_BS = id_BS - first_id
        is_local_BS = (column_BS >= 0) & (column_BS < score_BV.shape[1])
        column_BS = jnp.where(is_local_BS, column_BS, 0)
        local_BS = jnp.take_along_axis(score_BV, column_BS, axis=1)
        return psum(jnp.where(is_local_BS, local_BS, 0))

    target_score_B1 = scores_of(target_B[:, None])
    ahead_BV = (score_BV >= target_score_B1) & is_item_1V
    # The target itself is among them, which makes the count a rank that starts at 1.
    unmasked_B = psum(jnp.sum(ahead_BV, axis=1, dtype=jnp.int32))
    seen_score_BS = scores_of(seen_BS)
    masked_B = _mask(unmasked_B, target_score_B1, seen_score_BS, target_B, seen_BS, num_items)
    is_nan_B = psum(jnp.sum(jnp.isnan(score_BV) & is_item_1V, axis=1, dtype=jnp.int32)) > 0
    return masked_B, unmasked_B, is_nan_B


def rank_in_blocks(
    query_BQD: Array,
    item_VD: Array,
    target_B: Array,
    seen_BS: Array,
    combine: Callable[[Array], Array],
    block: int,
    *,
    num_items: int | None = None,
    first_id: int | Array = 0,
    psum: Callable[[Array], Array] = lambda local: local,
) -> tuple[Array, Array, Array]:
    """As `rank`, with the scores of only one block of items in memory at a time.

    Two passes over the items: the first looks up the scores of the target and of the seen items,
    the second counts the items that score at least as high. Both are iterations of one loop with
    one product in its body, so that an item has the same score to the last bit in both, and equal
    items tie. Devices that share the items sum before each pass and after the last one, not per
    block.

    Args:
      query_BQD: the queries of each history.
      item_VD: vectors of the items from `first_id` on; id 0 and ids past V are padding.
      target_B: int32 ids.
      seen_BS: int32 ids, distinct in a row, padded with 0.
      combine: score_BQV -> score_BV, for any slice of the items.
      block: items per block, at most len(item_VD).
      num_items: V; None: item_VD has V + 1 rows.
      first_id: as in `rank`.
      psum: as in `rank`.

    Returns:
      As `rank`.
    """
    if num_items is None:
        num_items = len(item_VD) - 1
    num_rows, num_local = len(target_B), len(item_VD)
    # The rows, in item_VD, of the target and the seen items; outside of it on other devices.
    lookup_BS = jnp.concatenate([target_B[:, None], seen_BS], axis=1) - first_id

    def one_pass(is_second: Array, carry: tuple) -> tuple:
        score_BS, *counts = carry
        # The first pass starts from zeros, the second from the scores found, summed over devices.
        carry = psum(score_BS), *counts
        body = functools.partial(one_block, is_second)
        return jax.lax.fori_loop(0, -(-num_local // block), body, carry)

    def one_block(is_second: Array, i: Array, carry: tuple) -> tuple:
        # All blocks have the same size; the last one may overlap the one before.
        begin = i * block
        start = jnp.minimum(begin, num_local - block)
        block_VD = jax.lax.dynamic_slice_in_dim(item_VD, start, block)
        # The barrier keeps XLA from moving parts of the product into the branches.
        score_BV = jax.lax.optimization_barrier(scores(query_BQD, block_VD, combine))
        row_1V = (start + jnp.arange(block))[None, :]
        is_new_1V = row_1V >= begin
        is_new_1V &= (first_id + row_1V > 0) & (first_id + row_1V <= num_items)
        return jax.lax.cond(is_second > 0, count, look_up, carry, score_BV, start, is_new_1V)

    def look_up(carry: tuple, score_BV: Array, start: Array, _: Array) -> tuple:
        score_BS, *counts = carry
        is_inside_BS = (lookup_BS >= start) & (lookup_BS < start + block)
        column_BS = jnp.where(is_inside_BS, lookup_BS - start, 0)
        new_BS = jnp.take_along_axis(score_BV, column_BS, axis=1)
        return jnp.where(is_inside_BS, new_BS, score_BS), *counts

    def count(carry: tuple, score_BV: Array, _: Array, is_new_1V: Array) -> tuple:
        score_BS, ahead_B, is_nan_B = carry
        ahead_BV = (score_BV >= score_BS[:, :1]) & is_new_1V
        ahead_B += jnp.sum(ahead_BV, axis=1, dtype=jnp.int32)
        is_nan_B |= jnp.any(jnp.isnan(score_BV) & is_new_1V, axis=1)
        return score_BS, ahead_B, is_nan_B

    zeros = jnp.zeros(lookup_BS.shape), jnp.zeros(num_rows, jnp.int32), jnp.zeros(num_rows, bool)
    score_BS, ahead_B, is_nan_B = jax.lax.fori_loop(0, 2, one_pass, zeros)
    unmasked_B = psum(ahead_B)
    masked_B = _mask(unmasked_B, score_BS[:, :1], score_BS[:, 1:], target_B, seen_BS, num_items)
    return masked_B, unmasked_B, psum(is_nan_B.astype(jnp.int32)) > 0


def _mask(
    unmasked_B: Array,
    target_score_B1: Array,
    seen_score_BS: Array,
    target_B: Array,
    seen_BS: Array,
    num_items: int,
) -> Array:
    """The masked ranks, from the unmasked ones and the scores of the seen items."""
    seen_ahead_BS = (seen_score_BS >= target_score_B1) & (seen_BS > 0)
    masked_B = unmasked_B - jnp.sum(seen_ahead_BS, axis=1, dtype=jnp.int32)
    is_seen_B = jnp.any(seen_BS == target_B[:, None], axis=1)
    is_last_B = is_seen_B | (target_score_B1[:, 0] == -jnp.inf)
    return jnp.where(is_last_B, num_items, masked_B)


def block_size(num_rows: int, num_queries: int, num_items: int) -> int:
    """Items to score at a time; 0: all at once.

    Args:
      num_rows: histories of a batch.
      num_queries: queries of a history.
      num_items: V, or the items of one device.
    """
    bytes_per_item = 4 * max(num_rows, min(num_rows * num_queries, QUERIES_AT_A_TIME))
    if bytes_per_item * num_items <= SCORES_AT_ONCE:
        return 0
    return min(max(1, SCORES_IN_BLOCK // bytes_per_item), num_items)


def rank_local(
    query_BQD: Array,
    item_VD: Array,
    target_B: Array,
    seen_BS: Array,
    combine: Callable[[Array], Array],
    *,
    num_items: int,
    block: int = 0,
    first_id: int | Array = 0,
    psum: Callable[[Array], Array] = lambda local: local,
) -> tuple[Array, Array, Array]:
    """The ranks from the items of one device, all at once or in blocks.

    Args:
      query_BQD: the queries of each history.
      item_VD: as `rank_in_blocks` has it.
      target_B: as `rank` has it.
      seen_BS: as `rank` has it.
      combine: score_BQV -> score_BV, for any slice of the items.
      num_items: V.
      block: items per block; 0: chosen by `block_size`.
      first_id: as in `rank`.
      psum: as in `rank`.

    Returns:
      As `rank`.
    """
    num_local = min(num_items, len(item_VD))
    block = block or block_size(*query_BQD.shape[:2], num_local)
    options = {'num_items': num_items, 'first_id': first_id, 'psum': psum}
    if 0 < block < num_local:
        return rank_in_blocks(query_BQD, item_VD, target_B, seen_BS, combine, block, **options)
    return rank(scores(query_BQD, item_VD, combine), target_B, seen_BS, **options)


def rank_sharded(
    query_BQD: Array,
    item_VD: Array,
    target_B: Array,
    seen_BS: Array,
    combine: Callable[[Array], Array],
    *,
    num_items: int,
    mesh: Mesh,
    block: int = 0,
) -> tuple[Array, Array, Array]:
    """The ranks on a mesh: each device scores its histories against its items.

    Args:
      query_BQD: the queries of each history; B a multiple of the devices along `data`.
      item_VD: [rows, D], split over `model`; row 0 and rows past V are padding.
      target_B: as `rank` has it.
      seen_BS: as `rank` has it.
      combine: score_BQV -> score_BV, for any slice of the items.
      num_items: V.
      mesh: the devices.
      block: items per block on each device; 0: chosen by `block_size`.

    Returns:
      As `rank`, replicated on all devices.
    """

    def one_shard(query_BQD: Array, item_VD: Array, target_B: Array, seen_BS: Array) -> tuple:
        ranks = rank_local(
            query_BQD,
            item_VD,
            target_B,
            seen_BS,
            combine,
            num_items=num_items,
            block=block,
            first_id=jax.lax.axis_index(MODEL) * len(item_VD),
            psum=lambda local: jax.lax.psum(local, MODEL),
        )
        return tuple(jax.lax.all_gather(part, DATA, tiled=True) for part in ranks)

    rows, items = PartitionSpec(DATA), PartitionSpec(MODEL)
    return jax.shard_map(
        one_shard,
        mesh=mesh,
        in_specs=(rows, items, rows, rows),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(query_BQD, item_VD, target_B, seen_BS)


def scores(query_BQD: Array, item_VD: Array, combine: Callable[[Array], Array]) -> Array:
    """Each item's score, float32 [B, V].

    With many queries per history, a few histories are scored at a time, so that score_BQV is never
    large.

    Args:
      query_BQD: the queries of each history.
      item_VD: any rows of item vectors.
      combine: score_BQV -> score_BV.
    """

    def some_histories(query_BQD: Array) -> Array:
        return combine(
            jnp.einsum('BQD,VD->BQV', query_BQD, item_VD, preferred_element_type=jnp.float32)
        )

    rows, queries, width = query_BQD.shape
    size = max(1, QUERIES_AT_A_TIME // queries)
    if rows <= size:
        return some_histories(query_BQD)
    # Not `lax.map(..., batch_size)`, which uses vmap: an exported `combine` has no batching rule.
    parts_NBQD = jnp.pad(query_BQD, ((0, -rows % size), (0, 0), (0, 0)))
    parts_NBQD = parts_NBQD.reshape(-1, size, queries, width)
    return jax.lax.map(some_histories, parts_NBQD).reshape(-1, len(item_VD))[:rows]


def rank_users(
    encode: Callable[..., Array],
    params: Any,
    item_VD: Array,
    eval_batches: Iterable[Any],
    num_users: int,
    combine: Callable[[Array], Array],
    *,
    num_items: int | None = None,
    mesh: Mesh | None = None,
    programs: Mapping[Rows, Future] = MappingProxyType({}),
) -> Ranks:
    """Ranks every user's target on the devices; only the ranks come back to the host.

    Args:
      encode: (params, tokens_BL, positions_BL, segments_BL) -> query_BQD, the queries of each
        history at its last position. It must be the same function object in every call, since
        programs are cached by it.
      params: the first argument of `encode`.
      item_VD: item vectors by id, [V + 1, D]; with a mesh split over `model`.
      eval_batches: `EvalBatch`es; those rows of which `is_user_B` is False are padding.
      num_users: U.
      combine: score_BQV -> score_BV, for any slice of the items.
      num_items: V; None: item_VD has V + 1 rows.
      mesh: the devices that share histories and items; None: one device.
      programs: from `compile_ranking`; other shapes are compiled when they are met.

    Raises:
      FloatingPointError: when a score is NaN.
    """
    if num_items is None:
        num_items = len(item_VD) - 1
    jitted = functools.partial(_rank_rows, encode, combine, num_items=num_items, mesh=mesh)
    ranks = Ranks(np.zeros(num_users, np.int32), np.zeros(num_users, np.int32))
    pending: deque[tuple] = deque()

    def read_first() -> None:
        is_user_B, user_B, of_batch = pending.popleft()
        masked_B, unmasked_B, is_nan_B = (np.asarray(part)[is_user_B] for part in of_batch)
        if np.any(is_nan_B):
            raise FloatingPointError('a score is NaN; the model cannot be evaluated')
        ranks.masked[user_B[is_user_B]] = masked_B
        ranks.unmasked[user_B[is_user_B]] = unmasked_B

    for batch in eval_batches:
        rows = _rows(batch)
        future = programs.get(_shapes(rows))
        rank_rows = future.result() if future else jitted
        of_batch = rank_rows(params, item_VD, _put_rows(rows, mesh))
        pending.append((batch.is_user_B, batch.user_B, of_batch))
        if len(pending) > BATCHES_AHEAD:
            read_first()
    while pending:
        read_first()
    return ranks


def compile_ranking(
    programs: dict[Rows, Future],
    encode: Callable[..., Array],
    params: Any,
    item_VD: Any,
    eval_batches: Iterable[Any],
    combine: Callable[[Array], Array],
    *,
    num_items: int,
    mesh: Mesh | None,
    executor: Executor | None = None,
) -> None:
    """Compiles the programs that `rank_users` needs, one for each shape of a batch.

    Args:
      programs: futures of the compiled programs by shapes; new ones are added.
      encode: as in `rank_users`.
      params: arrays or `jax.ShapeDtypeStruct`s with shardings.
      item_VD: an array or `jax.ShapeDtypeStruct` with its sharding.
      eval_batches: as in `rank_users`.
      combine: as in `rank_users`.
      num_items: V.
      mesh: as in `rank_users`.
      executor: where XLA compiles; tracing happens in the caller's thread. None: here and now.
    """
    for batch in eval_batches:
        rows = _rows(batch)
        if _shapes(rows) not in programs:
            lowered = _rank_rows.lower(
                encode,
                combine,
                params,
                item_VD,
                _put_rows(rows, mesh),
                num_items=num_items,
                mesh=mesh,
            )
            if executor is not None:
                programs[_shapes(rows)] = executor.submit(lowered.compile)
            else:
                programs[_shapes(rows)] = Future()
                programs[_shapes(rows)].set_result(lowered.compile())


@functools.partial(jax.jit, static_argnames=('encode', 'combine', 'num_items', 'mesh'))
def _rank_rows(
    encode: Callable[..., Array],
    combine: Callable[[Array], Array],
    params: Any,
    item_VD: Array,
    rows: Rows,
    num_items: int,
    mesh: Mesh | None,
) -> tuple[Array, Array, Array]:
    query_BQD = encode(params, rows.tokens_BL, rows.positions_BL, rows.segments_BL)
    arrays = query_BQD, item_VD, rows.target_B, rows.seen_BS
    if mesh is not None:
        return rank_sharded(*arrays, combine, num_items=num_items, mesh=mesh)
    return rank_local(*arrays, combine, num_items=num_items)


def _rows(batch: Any) -> Rows:
    return Rows(**{name: getattr(batch, name) for name in Rows._fields})


def _shapes(rows: Rows) -> Rows:
    return Rows(*(field.shape for field in rows))


def _put_rows(rows: Rows, mesh: Mesh | None) -> Rows:
    """The rows on the devices; each process passes the part that belongs to its devices."""
    part = process_rows(mesh, len(rows.target_B))
    return host_to_device(mesh, axis=0)(Rows(*(field[part] for field in rows)))
