"""The rank of each user's held-out item among all items, and what is told of the ranks.

Two protocols from one pass. Unmasked ranks among the whole catalogue; masked puts the items that
are already in the user's history below all others (score -inf). In both a tie counts against the
target, the padding is no item, and a NaN anywhere is an error and not a rank.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fame_jax.sharding import DATA, MODEL, feeder, rows_of_process

Array = jax.Array

CUTOFFS = (5, 10, 20)
PROTOCOLS = ('masked', 'unmasked')

# Scores of so many queries are held at a time, before they are combined.
QUERIES_AT_A_TIME = 1024

# Where a chunk's scores would take more, they are made in blocks of items, which take so much: a
# processor's cache holds that, and two passes over it are faster than one over all scores.
SCORES_AT_ONCE, SCORES_IN_BLOCK = 2**28, 2**24  # bytes


class Ranks(NamedTuple):
    """1 is best. int32 [U] each, in the order of users."""

    masked: np.ndarray
    unmasked: np.ndarray


def rank(
    score_BV: Array,
    target_B: Array,
    seen_BS: Array,
    *,
    num_items: int | None = None,
    first: int | Array = 0,
    total: Callable[[Array], Array] = lambda part: part,
) -> tuple[Array, Array, Array]:
    """Ranks one target a row.

    The masked rank is the unmasked one less the seen items that stand above or beside the target,
    which is exact and spares a second pass over V. A target that is itself in the history scores
    -inf when masked, and then every other item stands above or beside it.

    Args:
      score_BV: float, of the items from `first` on; id 0 is the padding, those past V are nobody.
      target_B: int32 ids.
      seen_BS: int32 ids, distinct in a row, 0 for none.
      num_items: V; None: there is a column an item and one for the padding, and no more.
      first: the id of the first column; 0 where all items are here.
      total: sums over the devices that have the other items.

    Returns:
      masked_B and unmasked_B, int32, and broken_B, bool: whether the row holds a NaN.
    """
    if num_items is None:
        num_items = score_BV.shape[1] - 1
    id_1V = (first + jnp.arange(score_BV.shape[1]))[None, :]
    real_1V = (id_1V > 0) & (id_1V <= num_items)

    def score_of(id_BS: Array) -> Array:
        here_BS = id_BS - first
        mine_BS = (here_BS >= 0) & (here_BS < score_BV.shape[1])
        found_BS = jnp.take_along_axis(score_BV, jnp.where(mine_BS, here_BS, 0), axis=1)
        return total(jnp.where(mine_BS, found_BS, 0))

    target_score_B1 = score_of(target_B[:, None])
    ahead_BV = (score_BV >= target_score_B1) & real_1V
    unmasked_B = total(jnp.sum(ahead_BV, axis=1, dtype=jnp.int32))  # ahead of itself too: + 1
    seen_score_BS = score_of(seen_BS)
    masked_B = _mask(unmasked_B, target_score_B1, seen_score_BS, target_B, seen_BS, num_items)
    broken_B = total(jnp.sum(jnp.isnan(score_BV) & real_1V, axis=1, dtype=jnp.int32)) > 0
    return masked_B, unmasked_B, broken_B


def rank_in_blocks(
    query_BQD: Array,
    item_VD: Array,
    target_B: Array,
    seen_BS: Array,
    combine: Callable[[Array], Array],
    block: int,
    *,
    num_items: int | None = None,
    first: int | Array = 0,
    total: Callable[[Array], Array] = lambda part: part,
) -> tuple[Array, Array, Array]:
    """The ranks of `rank`, where only a block of the items' scores is held at a time.

    Two passes over the items, one product in each: the first finds the scores of the target and of
    the seen items, the second counts who is ahead. Both are turns of one loop with one product in
    it, so that in the second pass an item scores to the last bit what it scored in the first, and a
    tie is a tie. Devices that share the items sum before each pass and after the last, and never
    from block to block.

    Args:
      query_BQD: the queries of each history.
      item_VD: vectors of the items from `first` on, as `rank` has their scores.
      target_B: int32 ids.
      seen_BS: int32 ids, distinct in a row, 0 for none.
      combine: score_BQV -> score_BV, of any slice of the items.
      block: items at a time, no more than are here.
      num_items: as `rank` has it.
      first: likewise.
      total: likewise.

    Returns:
      As `rank`.
    """
    if num_items is None:
        num_items = len(item_VD) - 1
    rows, here = len(target_B), len(item_VD)
    asked_BS = jnp.concatenate([target_B[:, None], seen_BS], axis=1) - first

    def one_pass(counting: Array, carry: tuple) -> tuple:
        score_BS, *counts = carry
        # Before the second pass: what each device has found in the first; before that: nothing.
        carry = total(score_BS), *counts
        return jax.lax.fori_loop(0, -(-here // block), functools.partial(one, counting), carry)

    def one(counting: Array, turn: Array, carry: tuple) -> tuple:
        # The last block is as long as the others and overlaps the one before.
        begin = turn * block
        start = jnp.minimum(begin, here - block)
        part_VD = jax.lax.dynamic_slice_in_dim(item_VD, start, block)
        # The barrier keeps the product whole: none of it moves into the branches.
        score_BV = jax.lax.optimization_barrier(scores(query_BQD, part_VD, combine))
        row_1V = (start + jnp.arange(block))[None, :]
        new_1V = (row_1V >= begin) & (first + row_1V > 0) & (first + row_1V <= num_items)
        return jax.lax.cond(counting > 0, count, pick, carry, score_BV, start, new_1V)

    def pick(carry: tuple, score_BV: Array, start: Array, _: Array) -> tuple:
        score_BS, *others = carry
        inside_BS = (asked_BS >= start) & (asked_BS < start + block)
        here_BS = jnp.where(inside_BS, asked_BS - start, 0)
        found_BS = jnp.take_along_axis(score_BV, here_BS, axis=1)
        return jnp.where(inside_BS, found_BS, score_BS), *others

    def count(carry: tuple, score_BV: Array, _: Array, new_1V: Array) -> tuple:
        score_BS, ahead_B, broken_B = carry
        ahead_BV = (score_BV >= score_BS[:, :1]) & new_1V
        ahead_B += jnp.sum(ahead_BV, axis=1, dtype=jnp.int32)
        broken_B |= jnp.any(jnp.isnan(score_BV) & new_1V, axis=1)
        return score_BS, ahead_B, broken_B

    zero = jnp.zeros(asked_BS.shape), jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    score_BS, ahead_B, broken_B = jax.lax.fori_loop(0, 2, one_pass, zero)
    unmasked_B = total(ahead_B)
    masked_B = _mask(unmasked_B, score_BS[:, :1], score_BS[:, 1:], target_B, seen_BS, num_items)
    return masked_B, unmasked_B, total(broken_B.astype(jnp.int32)) > 0


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
    repeated_B = jnp.any(seen_BS == target_B[:, None], axis=1)
    last_B = repeated_B | (target_score_B1[:, 0] == -jnp.inf)
    return jnp.where(last_B, num_items, masked_B)


def block_size(rows: int, queries: int, num_items: int, asked: int = 0) -> int:
    """How many items are scored at a time; 0 for all of them at once.

    Args:
      rows: histories at a time.
      queries: of a history.
      num_items: V, or a device's part of them.
      asked: this many; 0: all of them if that takes no more than SCORES_AT_ONCE bytes, else as many
        as take SCORES_IN_BLOCK.
    """
    if asked:
        return asked if asked < num_items else 0
    held = 4 * max(rows, min(rows * queries, QUERIES_AT_A_TIME))
    return (
        min(max(1, SCORES_IN_BLOCK // held), num_items) if held * num_items > SCORES_AT_ONCE else 0
    )


@functools.partial(
    jax.jit, static_argnames=('encode', 'combine', 'num_items', 'eval_items', 'mesh')
)
def _rank_rows(
    encode: Callable[..., Array],
    combine: Callable[[Array], Array],
    params: Any,
    item_VD: Array,
    rows: tuple,
    num_items: int,
    eval_items: int,
    mesh: Mesh | None,
) -> tuple[Array, Array, Array]:
    tokens_BL, positions_BL, segments_BL, seen_BS, target_B = rows
    query_BQD = encode(params, tokens_BL, positions_BL, segments_BL)
    asked = query_BQD, item_VD, target_B, seen_BS, combine
    if mesh is not None:
        return rank_divided(*asked, num_items=num_items, eval_items=eval_items, mesh=mesh)
    return _rank_here(*asked, eval_items, num_items=num_items)


def _rank_here(
    query_BQD: Array,
    item_VD: Array,
    target_B: Array,
    seen_BS: Array,
    combine: Callable[[Array], Array],
    eval_items: int,
    *,
    num_items: int,
    **where: Any,
) -> tuple[Array, Array, Array]:
    """The ranks from the items that a device has, in blocks of them or all at once."""
    here = min(num_items, len(item_VD))
    block = block_size(*query_BQD.shape[:2], here, eval_items)
    where = {'num_items': num_items, **where}
    if block:
        return rank_in_blocks(query_BQD, item_VD, target_B, seen_BS, combine, block, **where)
    return rank(scores(query_BQD, item_VD, combine), target_B, seen_BS, **where)


def rank_divided(
    query_BQD: Array,
    item_VD: Array,
    target_B: Array,
    seen_BS: Array,
    combine: Callable[[Array], Array],
    *,
    num_items: int,
    eval_items: int,
    mesh: Mesh,
) -> tuple[Array, Array, Array]:
    """The ranks, each device scoring its histories and its items; all of them know all ranks.

    Args:
      query_BQD: the queries of each history; B a multiple of the devices along `data`.
      item_VD: [rows, D], split over `model`; row 0 is the padding, rows past V are nobody's.
      target_B: as `rank` has it.
      seen_BS: likewise.
      combine: score_BQV -> score_BV, of any slice of the items.
      num_items: V.
      eval_items: a device's items scored at a time; 0: what `block_size` says.
      mesh: the devices.

    Returns:
      As `rank`.
    """

    def part(query_BQD: Array, item_VD: Array, target_B: Array, seen_BS: Array) -> tuple:
        ranks = _rank_here(
            *(query_BQD, item_VD, target_B, seen_BS, combine, eval_items),
            num_items=num_items,
            first=jax.lax.axis_index(MODEL) * len(item_VD),
            total=lambda part: jax.lax.psum(part, MODEL),
        )
        return tuple(jax.lax.all_gather(part, DATA, tiled=True) for part in ranks)

    rows, items = PartitionSpec(DATA), PartitionSpec(MODEL)
    divided = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(rows, items, rows, rows),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return divided(query_BQD, item_VD, target_B, seen_BS)


def scores(query_BQD: Array, item_VD: Array, combine: Callable[[Array], Array]) -> Array:
    """Each item's score, float32 [B, V], a few histories at a time where they have many queries."""

    def some(query_BQD: Array) -> Array:
        return combine(
            jnp.einsum('BQD,VD->BQV', query_BQD, item_VD, preferred_element_type=jnp.float32)
        )

    rows, queries, width = query_BQD.shape
    size = max(1, QUERIES_AT_A_TIME // queries)
    if rows <= size:
        return some(query_BQD)
    # By hand and not by vmap, under which an exported `combine` cannot be called.
    parts_NBQD = jnp.pad(query_BQD, ((0, -rows % size), (0, 0), (0, 0)))
    parts_NBQD = parts_NBQD.reshape(-1, size, queries, width)
    return jax.lax.map(some, parts_NBQD).reshape(-1, len(item_VD))[:rows]


def rank_users(
    encode: Callable[..., Array],
    params: Any,
    item_VD: Array,
    held: Iterable[Any],
    num_users: int,
    combine: Callable[[Array], Array],
    eval_items: int = 0,
    num_items: int | None = None,
    mesh: Mesh | None = None,
    programs: Mapping[tuple, Callable[..., Any]] = MappingProxyType({}),
) -> Ranks:
    """Ranks every user's target on the device; only ranks come back.

    Args:
      encode: (params, tokens_BL, positions_BL, segments_BL) -> query_BQD, the queries of each
        history, of its last column where there is one a column; the same function object each time,
        since it is compiled once for each.
      params: what encode takes.
      item_VD: item vectors by id, [V + 1, D].
      held: chunks with tokens_BL, positions_BL, segments_BL, seen_BS, target_B, user_B; a target of
        0 marks a row that only fills up.
      num_users: U.
      combine: score_BQV -> score_BV, of any slice of the items.
      eval_items: items scored at a time; 0: all of them, or what `block_size` says.
      num_items: V; None: there is a vector an item and one for the padding, and no more.
      mesh: the devices that share histories and items; `eval_items` are of each device's own.
      programs: of `compile_ranking`, for the shapes that were compiled ahead.

    Raises:
      FloatingPointError: when a score is NaN.
    """
    if num_items is None:
        num_items = len(item_VD) - 1
    options = {'num_items': num_items, 'eval_items': eval_items, 'mesh': mesh}
    compiled_here = functools.partial(_rank_rows, encode, combine, **options)
    pending = []
    for chunk in held:
        rank_rows = programs.get(_shape(chunk), compiled_here)
        pending.append((chunk, rank_rows(params, item_VD, _rows(chunk, mesh))))
    ranks = Ranks(np.zeros(num_users, np.int32), np.zeros(num_users, np.int32))
    for chunk, (masked_B, unmasked_B, broken_B) in pending:
        real_B = chunk.target_B > 0
        if np.any(np.asarray(broken_B)[real_B]):
            raise FloatingPointError('a score is NaN; the model cannot be judged')
        ranks.masked[chunk.user_B[real_B]] = np.asarray(masked_B)[real_B]
        ranks.unmasked[chunk.user_B[real_B]] = np.asarray(unmasked_B)[real_B]
    return ranks


def compile_ranking(
    programs: dict[tuple, Callable[..., Any]],
    encode: Callable[..., Array],
    params: Any,
    item_VD: Any,
    held: Iterable[Any],
    combine: Callable[[Array], Array],
    eval_items: int,
    num_items: int,
    mesh: Mesh | None,
) -> None:
    """Compiles ahead what `rank_users` will run, a program for each shape that chunks have.

    Args:
      programs: where they go, and those that are there already.
      params: shapes and places are enough, here and of `item_VD`; all else is as `rank_users` has
        it.
    """
    for chunk in held:
        if _shape(chunk) not in programs:
            options = {'num_items': num_items, 'eval_items': eval_items, 'mesh': mesh}
            lowered = _rank_rows.lower(
                encode, combine, params, item_VD, _rows(chunk, mesh), **options
            )
            programs[_shape(chunk)] = lowered.compile()


def _shape(chunk: Any) -> tuple:
    return tuple(field.shape for field in chunk[:5])


def _rows(chunk: Any, mesh: Mesh | None) -> tuple:
    """A chunk's rows where they shall be ranked; of several processes, each gives its own."""
    part = rows_of_process(mesh, len(chunk.target_B))
    return feeder(mesh, axis=0)(tuple(field[part] for field in chunk[:5]))


def metrics(rank_U: np.ndarray) -> dict[str, float]:
    """HR@k, NDCG@k for k in 5, 10, 20, and MRR; means over users, one relevant item each.

    NDCG@k is 1 / log2(1 + rank) within the cut-off, since the ideal gain of one item is 1.

    Args:
      rank_U: int, 1 is best.

    Raises:
      ValueError: without users, or with a rank below 1.
    """
    if not len(rank_U) or rank_U.min() < 1:
        raise ValueError('ranks begin at 1, and there is at least one user')
    rank_U = rank_U.astype(np.float64)
    result = {}
    for k in CUTOFFS:
        result[f'hr@{k}'] = float(np.mean(rank_U <= k))
    for k in CUTOFFS:
        result[f'ndcg@{k}'] = float(np.mean(np.where(rank_U <= k, 1 / np.log2(1 + rank_U), 0)))
    return {**result, 'mrr': float(np.mean(1 / rank_U))}


def popularity(items: np.ndarray, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """The floor: every user gets the items of most actions; a query and item vectors of width 1.

    Args:
      items: int32, the training actions.
      num_items: V.

    Returns:
      query_D, ones [1], and item_VD, float32 counts [V + 1, 1].
    """
    count_V = np.bincount(items, minlength=num_items + 1).astype(np.float32)
    return np.ones(1, np.float32), count_V[:, None]
