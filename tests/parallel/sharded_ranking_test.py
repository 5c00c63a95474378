"""Ranks on a mesh of eight devices are those of one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_fixtures import MESHES, collectives, on_eight
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fame_jax.data import eval_batches
from fame_jax.data.eval_batches import EvalBatches
from fame_jax.evaluation import ranking
from fame_jax.parallel import mesh as mesh_lib

EXAMPLES = 3  # each is compiled; the same ones in every session, for the cache


def highest(score_BQV):
    return score_BQV.max(axis=1)


def put_items(item_VD, mesh, padding=np.nan):
    """Item vectors split over `model`; the value of padding rows past V must have no effect."""
    count = mesh_lib.table_rows(len(item_VD) - 1, mesh)
    filled = np.full((count, item_VD.shape[1]), padding, np.float32)
    filled[: len(item_VD)] = item_VD
    return jax.device_put(filled, mesh_lib.item_sharding(mesh))


def make_inputs(num_items, rows=8, seed=0, rounded=True):
    """Queries, item vectors, targets and seen items; the last items equal the first ones."""
    draw = np.random.default_rng(seed)
    query_BQD = draw.normal(size=(rows, 2, 24))
    item_VD = draw.normal(size=(num_items + 1, 24))
    if rounded:  # exact products, many of them equal
        query_BQD, item_VD = np.round(query_BQD), np.round(item_VD)
    half = num_items // 2
    item_VD[1 + num_items - half :] = item_VD[1 : half + 1]
    target_B = draw.integers(1, num_items + 1, rows).astype(np.int32)
    seen_BS = np.zeros((rows, 6), np.int32)
    for row in seen_BS:
        some = draw.choice(num_items, min(5, num_items), replace=False) + 1
        row[: len(some)] = some
        draw.shuffle(row)
    return query_BQD.astype(np.float32), item_VD.astype(np.float32), target_B, seen_BS


@functools.partial(jax.jit, static_argnames=('num_items', 'block', 'mesh'))
def rank_sharded(query_BQD, item_VD, target_B, seen_BS, **options):
    return ranking.rank_sharded(query_BQD, item_VD, target_B, seen_BS, highest, **options)


def at_once(query_BQD, item_VD, target_B, seen_BS):
    score_BV = np.einsum('BQD,VD->BQV', query_BQD, item_VD).max(axis=1)
    return jax.jit(ranking.rank)(score_BV, target_B, seen_BS)


@on_eight
@given(
    mesh=st.sampled_from(MESHES),
    num_items=st.integers(1, 40),
    block=st.integers(1, 41),
    seed=st.integers(0, 99),
)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@example(mesh=(1, 8), num_items=3, block=1, seed=0)  # devices with padding rows only
@example(mesh=(2, 4), num_items=33, block=4, seed=1)  # the last block overlaps
@example(mesh=(4, 2), num_items=33, block=16, seed=2)
@example(mesh=(8, 1), num_items=40, block=39, seed=3)
@example(mesh=(1, 8), num_items=40, block=5, seed=4)
def test_sharded_ranks_are_those_of_one_device(mesh, num_items, block, seed):
    data = make_inputs(num_items, seed=seed)
    query_BQD, item_VD, *others = data
    mesh = mesh_lib.make_mesh(*mesh)
    options = {'num_items': num_items, 'block': block, 'mesh': mesh}
    ranks = rank_sharded(query_BQD, put_items(item_VD, mesh), *others, **options)
    for one, many in zip(at_once(*data), ranks):
        np.testing.assert_array_equal(many, one)
        assert many.dtype == one.dtype


@on_eight
@pytest.mark.parametrize('block', [0, 7])
def test_equal_items_of_two_devices_tie_to_the_last_bit(block):
    """The item that equals the target is on another device."""
    mesh, num_items = mesh_lib.make_mesh(2, 4), 400
    query_BQD, item_VD, target_B, seen_BS = make_inputs(num_items, rounded=False)
    options = {'num_items': num_items, 'block': block, 'mesh': mesh}
    others = target_B, seen_BS * 0
    _, unmasked_B, _ = rank_sharded(query_BQD, put_items(item_VD, mesh), *others, **options)
    score_BV = np.einsum('BQD,VD->BQV', *(x.astype(np.float64) for x in (query_BQD, item_VD)))
    score_BV = score_BV.max(axis=1)[:, 1:]
    target_score_B1 = np.take_along_axis(score_BV, target_B[:, None] - 1, axis=1)
    is_tie_BV = np.abs(score_BV - target_score_B1) < 1e-12
    assert (is_tie_BV.sum(axis=1) == 2).all()
    np.testing.assert_array_equal(
        unmasked_B, ((score_BV > target_score_B1) | is_tie_BV).sum(axis=1, dtype=np.int32)
    )


@on_eight
@pytest.mark.parametrize('item', [0, 1, 33])
def test_a_nan_on_any_device_is_reported(item):
    mesh = mesh_lib.make_mesh(2, 4)
    query_BQD, item_VD, *others = make_inputs(33)
    item_VD[item] = np.nan
    options = {'num_items': 33, 'block': 4, 'mesh': mesh}
    ranks = rank_sharded(query_BQD, put_items(item_VD, mesh), *others, **options)
    assert (np.asarray(ranks[2]) == (item > 0)).all()


@on_eight
@pytest.mark.parametrize('sizes', MESHES)
def test_long_histories_have_the_ranks_of_one_device(sizes, monkeypatch):
    """In batches of few rows, which the devices along `data` share."""
    monkeypatch.setattr(eval_batches, 'SEEN_PLACES', 64)
    draw, num_items = np.random.default_rng(0), 33
    lengths = np.array([3, 100, 5, 17, 1, 40, 2, 9, 4, 12])
    items = draw.integers(1, num_items + 1, lengths.sum()).astype(np.int32)
    ends = np.cumsum(lengths)
    arrays = items, ends - lengths, ends, draw.integers(1, num_items + 1, 10), 8, 8
    item_VD = np.round(draw.normal(size=(num_items + 1, 24))).astype(np.float32)
    mesh = mesh_lib.make_mesh(*sizes)

    def encode(table_VD, tokens_BL, *_):
        return table_VD[tokens_BL[:, -1:]]

    def ranks(mesh, item_VD, multiple):
        batches = EvalBatches(*arrays, multiple)
        rows = [len(batch.user_B) for batch in batches]
        options = {'num_items': num_items, 'mesh': mesh}
        arguments = item_VD[: num_items + 1], item_VD, batches, 10, highest
        return rows, ranking.rank_users(encode, *arguments, **options)

    small, one = ranks(None, item_VD, 1)
    shared, many = ranks(mesh, put_items(item_VD, mesh), sizes[0])
    assert small == [4, 4, 1, 1, 1]
    assert all(rows % sizes[0] == 0 for rows in shared)
    np.testing.assert_array_equal(many, one)


def compile_ranking(mesh, num_items, block, rows=8, seen=6):
    like = functools.partial(jax.ShapeDtypeStruct)
    item_VD = like((mesh_lib.table_rows(num_items, mesh), 24), jnp.float32)
    arrays = like((rows, 2, 24), jnp.float32), item_VD, like((rows,), jnp.int32)
    options = {'num_items': num_items, 'block': block, 'mesh': mesh}
    return rank_sharded.lower(*arrays, like((rows, seen), jnp.int32), **options).compile()


@on_eight
def test_blocks_send_nothing_to_other_devices():
    """Collectives are in the loop over the two passes or outside of it, and send little."""
    compiled = compile_ranking(mesh_lib.make_mesh(2, 4), 40_000, 100)
    sent = collectives(compiled)
    # Looked-up scores; counts and NaNs; the three results over `data`.
    assert len(sent) <= 6
    assert max(size for _, size in sent) <= 8 * (1 + 6)  # scores of the target and of seen items
    parts = compiled.as_text().split('\n\n')
    sending = [part for part in parts if re.search(r' all-(reduce|gather)\(', part)]
    loops = [part for part in sending if not part.startswith('ENTRY')]
    assert len(loops) == 1 and ' while(' in loops[0]  # over the blocks


@on_eight
def test_memory_of_a_device_is_the_scores_of_a_block():
    mesh, rows = mesh_lib.make_mesh(1, 8), 64
    sizes = [
        compile_ranking(mesh, num_items, 1024, rows).memory_analysis().temp_size_in_bytes
        for num_items in (100_000, 400_000)
    ]
    assert sizes[0] < 6 * 4 * rows * 1024  # the scores of two queries, and arrays made from them
    assert abs(sizes[1] - sizes[0]) < 2**16
