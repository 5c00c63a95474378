"""Ranks and metrics against arithmetic by hand, a slow oracle and another library."""

import math

import ir_measures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, Success, nDCG

from fame_jax import evaluate
from fame_jax.data import pipeline

INF = float('inf')
RANK = jax.jit(evaluate.rank)


def ranks(scores, target, seen=()):
    """Masked and unmasked rank of one row; `scores` begins with item 1."""
    score_BV = jnp.array([[0.0, *scores]], jnp.float32)
    seen_BS = jnp.array([[*seen, 0, 0]], jnp.int32)
    masked, unmasked, broken = RANK(score_BV, jnp.array([target], jnp.int32), seen_BS)
    return int(masked[0]), int(unmasked[0]), bool(broken[0])


def slow_rank(scores, target, seen=()):
    """Sets the seen items to -inf and counts who stands above or beside the target."""
    scores = {item: -INF if item in seen else s for item, s in enumerate(scores, 1)}
    return 1 + sum(s >= scores[target] for item, s in scores.items() if item != target)


@pytest.mark.parametrize(
    ('scores', 'target', 'seen', 'masked', 'unmasked'),
    [
        ([3, 2, 1], 1, (), 1, 1),
        ([3, 2, 1], 3, (), 3, 3),
        ([3, 2, 1], 3, (1,), 2, 3),  # a seen item above goes
        ([3, 2, 1], 1, (2, 3), 1, 1),  # seen items below change nothing
        ([2, 2, 1], 1, (), 2, 2),  # a tie counts against the target
        ([2, 2, 1], 1, (2,), 1, 2),  # unless it is masked
        ([5, 5, 5, 5], 2, (), 4, 4),  # constant scores: last
        ([5, 5, 5, 5], 2, (1, 3), 2, 4),
        ([3, 2, 1], 1, (1, 2), 3, 1),  # the target is in his own history: last when masked
        ([5, 5, 5], 2, (2,), 3, 3),
        ([-1, -2, -3], 1, (), 1, 1),  # the padding's 0 is above all and counts for nothing
        ([INF, 1, 2], 1, (), 1, 1),
        ([INF, INF, 2], 1, (), 2, 2),
        ([INF, INF, 2], 1, (2,), 1, 2),
        ([INF, 1, -INF], 2, (1,), 1, 2),
        ([-INF, 1, 2], 1, (), 3, 3),
        ([0.0, -0.0, -1], 1, (), 2, 2),
        ([7], 1, (), 1, 1),  # a catalogue of one
        ([7], 1, (1,), 1, 1),
        ([-INF], 1, (), 1, 1),
    ],
)
def test_rank_by_hand(scores, target, seen, masked, unmasked):
    assert ranks(scores, target, seen) == (masked, unmasked, False)
    assert slow_rank(scores, target) == unmasked
    assert slow_rank(scores, target, seen) == masked


def test_a_target_of_minus_infinity_ties_with_what_is_masked():
    """All that is masked scores -inf too, and a tie counts against the target."""
    assert slow_rank([-INF, 2, 3], 1, seen=(2,)) == 3
    assert ranks([-INF, 2, 3], 1, seen=(2,)) == (3, 3, False)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, INF]), min_size=6, max_size=6),
    st.integers(1, 6),
    st.sets(st.integers(1, 6)),
)
def test_masked_is_as_if_the_seen_scores_were_minus_infinity(scores, target, seen):
    padded = sorted(seen) + [0] * (6 - len(seen))
    masked, unmasked, broken = ranks(scores, target, padded)
    assert unmasked == slow_rank(scores, target)
    assert masked == (6 if target in seen else slow_rank(scores, target, seen))
    assert not broken


def test_many_rows_at_once():
    rng = np.random.default_rng(0)
    score_BV = rng.integers(-4, 5, (64, 31)).astype(np.float32)
    target_B = rng.integers(1, 31, 64).astype(np.int32)
    seen = [set(rng.integers(1, 31, 9).tolist()) for _ in range(64)]
    seen_BS = np.zeros((64, 12), np.int32)
    for row, items in zip(seen_BS, seen):
        row[rng.permutation(12)[: len(items)]] = sorted(items)  # zeros may stand anywhere
    masked_B, unmasked_B, broken_B = RANK(score_BV, target_B, seen_BS)
    for b in range(64):
        scores = score_BV[b, 1:].tolist()
        assert unmasked_B[b] == slow_rank(scores, target_B[b])
        assert masked_B[b] == slow_rank(scores, target_B[b], seen[b])
    assert not broken_B.any()


def test_the_padding_is_never_counted():
    seen_BS = jnp.array([[0, 1, 0]])
    for huge in (1e30, INF, float('nan')):
        score_BV = jnp.array([[huge, 3, 2, 1]], jnp.float32)
        masked_B, unmasked_B, broken_B = RANK(score_BV, jnp.array([3]), seen_BS)
        assert (masked_B[0], unmasked_B[0], broken_B[0]) == (2, 3, False)


@pytest.mark.parametrize('column', [1, 2, 3])
def test_a_nan_among_the_items_is_told(column):
    scores = [3.0, 2.0, 1.0]
    scores[column - 1] = float('nan')
    assert ranks(scores, 2)[2]


def scores_of_first(params, tokens_BL, positions_BL, segments_BL):
    """A model whose query says only which item came last: row i of its table."""
    return params[tokens_BL[:, -1:]]


def only(score_BQV):
    return score_BQV[:, 0]


def held(histories, targets, max_length=8, users=2):
    items = np.array([item for history in histories for item in history], np.int32)
    offsets = np.cumsum([0, *map(len, histories)], dtype=np.int64)
    return list(pipeline.held_rows(items, offsets, np.array(targets), max_length, users))


def judge(table_VD, histories, targets, **about):
    """Ranks where the score of item v after item i is table_VD[i, v]."""
    table_VD = jnp.asarray(table_VD, jnp.float32)
    item_VD = jnp.eye(table_VD.shape[1])
    chunks = held(histories, targets, **about)
    return evaluate.rank_users(scores_of_first, table_VD, item_VD, chunks, len(histories), only)


def a_table():
    """Scores of 5 items after each of 5 items; row and column 0 are the padding's."""
    table_VD = np.zeros((6, 6), np.float32)
    for i in range(1, 6):
        table_VD[i, 1:] = [(v * i) % 7 for v in range(1, 6)]
    return table_VD


def test_rank_users_keeps_the_order_of_users():
    histories = [1, 2, 3], [4, 2], [5]  # chunks come shortest first
    targets = [4, 1, 2]
    table_VD = a_table()
    found = judge(table_VD, histories, targets)
    for user, (history, target) in enumerate(zip(histories, targets)):
        scores = table_VD[history[-1], 1:].tolist()
        assert found.masked[user] == slow_rank(scores, target, history)
        assert found.unmasked[user] == slow_rank(scores, target)
    assert found.masked.dtype == found.unmasked.dtype == np.int32


def test_a_history_longer_than_the_row_is_masked_whole():
    table_VD = np.zeros((13, 13), np.float32)
    table_VD[12, 1:] = range(12, 0, -1)  # after item 12, item 1 is best and item 12 last
    found = judge(table_VD, [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]], [11], max_length=2, users=1)
    assert found.unmasked.tolist() == [11]
    assert found.masked.tolist() == [1]


def test_a_nan_is_an_error_and_not_a_rank():
    table_VD = a_table()
    table_VD[2, 3] = float('nan')
    with pytest.raises(FloatingPointError, match='NaN'):
        judge(table_VD, [[1], [2], [3]], [4, 4, 4])


def test_a_nan_where_no_item_stands_is_none():
    histories, targets = [[1], [2], [3]], [4, 4, 4]
    clean = judge(a_table(), histories, targets)

    # In the row that only fills up: its last item is the padding.
    table_VD = a_table()
    table_VD[0] = float('nan')
    assert len(held(histories, targets)) == 2
    found = judge(table_VD, histories, targets)
    np.testing.assert_array_equal(found, clean)

    # In the padding's column of every row.
    def encode(params, tokens_BL, positions_BL, segments_BL):
        return jnp.ones((len(tokens_BL), 1, 1))

    item_VD = jnp.array([[float('nan')], [3.0], [2.0], [1.0]])
    ranks = evaluate.rank_users(encode, None, item_VD, held([[1], [2]], [3, 3]), 2, only)
    assert ranks.unmasked.tolist() == [3, 3]
    assert ranks.masked.tolist() == [2, 2]


def test_one_item_in_the_catalogue():
    found = judge([[0, 0], [0, 7]], [[1], [1]], [1, 1])
    assert found.masked.tolist() == found.unmasked.tolist() == [1, 1]


def test_metrics_as_expressions():
    """Ranks 1, 2, 5, 6, 20, 21: who is within each cut-off, and what it counts."""
    found = evaluate.metrics(np.array([1, 2, 5, 6, 20, 21], np.int32))
    log2 = math.log2
    expected = {
        'hr@5': 3 / 6,
        'hr@10': 4 / 6,
        'hr@20': 5 / 6,
        'ndcg@5': (1 + 1 / log2(3) + 1 / log2(6)) / 6,
        'ndcg@10': (1 + 1 / log2(3) + 1 / log2(6) + 1 / log2(7)) / 6,
        'ndcg@20': (1 + 1 / log2(3) + 1 / log2(6) + 1 / log2(7) + 1 / log2(21)) / 6,
        'mrr': (1 + 1 / 2 + 1 / 5 + 1 / 6 + 1 / 20 + 1 / 21) / 6,
    }
    assert list(found) == list(expected)
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(type(value) is float for value in found.values())


def test_the_cut_off_includes_its_rank():
    for k in evaluate.CUTOFFS:
        inside, outside = (evaluate.metrics(np.array([r])) for r in (k, k + 1))
        assert (inside[f'hr@{k}'], outside[f'hr@{k}']) == (1, 0)
        assert (inside[f'ndcg@{k}'], outside[f'ndcg@{k}']) == (1 / math.log2(1 + k), 0)


@pytest.mark.parametrize('ranks', [[], [0], [3, 0, 1], [-1]])
def test_metrics_refuse_what_is_no_rank(ranks):
    with pytest.raises(ValueError, match='ranks begin at 1'):
        evaluate.metrics(np.array(ranks, np.int32))


@pytest.mark.parametrize('protocol', evaluate.PROTOCOLS)
@pytest.mark.parametrize('num_items', [3, 60])
def test_metrics_agree_with_another_library(protocol, num_items):
    rng = np.random.default_rng(num_items)
    users = 40
    score_BV = np.stack([rng.permutation(num_items + 1) for _ in range(users)])
    target_B = rng.integers(1, num_items + 1, users)
    seen_BS = rng.integers(1, num_items + 1, (users, 1 if num_items == 3 else 9))
    seen_BS[seen_BS == target_B[:, None]] = 0
    for row in seen_BS:
        row[[item in row[:s] for s, item in enumerate(row)]] = 0  # each item once
    masked_B, unmasked_B, _ = RANK(score_BV.astype(np.float32), target_B, seen_BS)
    found = evaluate.metrics(np.asarray({'masked': masked_B, 'unmasked': unmasked_B}[protocol]))

    gone = [set(row) if protocol == 'masked' else set() for row in seen_BS.tolist()]
    qrels = {f'u{b}': {f'i{target_B[b]}': 1} for b in range(users)}
    run = {
        f'u{b}': {
            f'i{v}': float(score_BV[b, v]) for v in range(1, num_items + 1) if v not in gone[b]
        }
        for b in range(users)
    }
    measures = {'mrr': RR}
    for k in evaluate.CUTOFFS:
        measures |= {f'hr@{k}': Success @ k, f'ndcg@{k}': nDCG @ k}
    theirs = ir_measures.calc_aggregate(measures.values(), qrels, run)
    assert found == pytest.approx({name: theirs[m] for name, m in measures.items()}, abs=1e-9)


def test_the_floor_of_popularity():
    """Item 3 three times, item 1 twice, item 4 once, items 2 and 5 never."""
    log = np.array([1, 3, 3, 4, 1, 3], np.int32)
    query_D, item_VD = evaluate.popularity(log, 5)
    assert query_D.tolist() == [1]
    assert item_VD[:, 0].tolist() == [0, 2, 0, 3, 1, 0]
    assert query_D.dtype == item_VD.dtype == np.float32

    def encode(params, tokens_BL, positions_BL, segments_BL):
        return jnp.broadcast_to(params[None, None], (len(tokens_BL), 1, 1))

    chunks = held([[1, 3], [3, 4], [1, 3]], [4, 1, 2])
    ranks = evaluate.rank_users(encode, query_D, item_VD, chunks, 3, only)
    assert ranks.unmasked.tolist() == [3, 2, 5]
    assert ranks.masked.tolist() == [1, 1, 3]


@pytest.mark.parametrize('rows', [1, 3, 7])
def test_scores_in_parts_are_the_scores(rows, monkeypatch):
    """Three histories of two queries at a time; the last part is filled up and cut again."""
    monkeypatch.setattr(evaluate, 'QUERIES_AT_A_TIME', 6)
    draw = np.random.default_rng(rows)
    query_BQD, item_VD = draw.normal(size=(rows, 2, 4)), draw.normal(size=(5, 4))
    score_BV = evaluate.scores(
        jnp.asarray(query_BQD), jnp.asarray(item_VD), lambda s: s.max(axis=1)
    )
    expected_BV = (query_BQD @ item_VD.T).max(axis=1)
    np.testing.assert_allclose(score_BV, expected_BV, rtol=1e-5, atol=1e-6)


# In blocks of items.


def in_blocks(query_BQD, item_VD, target_B, seen_BS, combine, block):
    f = jax.jit(evaluate.rank_in_blocks, static_argnames=('combine', 'block'))
    return f(query_BQD, item_VD, target_B, seen_BS, combine=combine, block=block)


def at_once(query_BQD, item_VD, target_B, seen_BS, combine):
    f = jax.jit(lambda *args: evaluate.rank(evaluate.scores(*args[:2], combine), *args[2:]))
    return f(query_BQD, item_VD, target_B, seen_BS)


def highest(score_BQV):
    return score_BQV.max(axis=1)


def make(rows, queries, items, seen=6, seed=0, whole=False):
    """Queries, items, targets and seen items; every third item is a twin of the one before."""
    draw = np.random.default_rng(seed)
    query_BQD = draw.normal(size=(rows, queries, 24))
    item_VD = draw.normal(size=(items + 1, 24))
    if whole:  # products of small numbers are exact, and often alike
        query_BQD, item_VD = np.round(query_BQD), np.round(item_VD)
    item_VD[3::3] = item_VD[2::3][: len(item_VD[3::3])]
    target_B = draw.integers(1, items + 1, rows)
    seen_BS = np.zeros((rows, seen), np.int32)
    for row in seen_BS:
        some = draw.choice(items, min(seen - 1, items), replace=False) + 1
        row[: len(some)] = some
        draw.shuffle(row)
    floats = (jnp.asarray(x, jnp.float32) for x in (query_BQD, item_VD))
    return *floats, jnp.asarray(target_B, jnp.int32), jnp.asarray(seen_BS)


@pytest.mark.parametrize(('items', 'blocks'), [(1, [1]), (2, [1]), (7, [3, 7]), (100, [9, 50, 99])])
@pytest.mark.parametrize(('queries', 'combine'), [(1, only), (3, highest)])
def test_ranks_in_blocks_of_exact_scores_are_the_ranks(items, blocks, queries, combine):
    data = make(16, queries, items, whole=True)
    expected = at_once(*data, combine)
    for block in blocks:
        for found, wanted in zip(in_blocks(*data, combine, block), expected):
            np.testing.assert_array_equal(found, wanted)
            assert found.dtype == wanted.dtype


@pytest.mark.parametrize('block', [37, 1999])
@pytest.mark.parametrize(('queries', 'combine'), [(1, only), (3, highest)])
def test_ties_of_rounded_scores_are_ties(block, queries, combine):
    """Each row's target is also every twin of its own: all of them stand beside it, to the bit."""
    query_BQD, item_VD, _, seen_BS = make(40, queries, 2000)
    # Twins far apart, in other blocks and in other lanes: item i + 1000 is item i.
    item_VD = item_VD.at[1001:].set(item_VD[1:1001])
    target_B = jnp.arange(1, 41) * 50
    masked_B, unmasked_B, broken_B = in_blocks(
        query_BQD, item_VD, target_B, seen_BS, combine, block
    )
    score_BV = np.einsum(
        'BQD,VD->BQV', np.asarray(query_BQD, np.float64), np.asarray(item_VD, np.float64)
    )
    score_BV = np.asarray(combine(score_BV))
    for b, target in enumerate(np.asarray(target_B)):
        # In float64 twins tie exactly, and no others come near.
        near = np.abs(score_BV[b, 1:] - score_BV[b, target]) < 1e-12
        assert near.sum() >= 2
        assert unmasked_B[b] == (score_BV[b, 1:] > score_BV[b, target] + 1e-12).sum() + near.sum()
        seen = {v for v in np.asarray(seen_BS)[b].tolist() if v}
        gone = sum(score_BV[b, v] > score_BV[b, target] - 1e-12 for v in seen)
        assert masked_B[b] == (2000 if target in seen else unmasked_B[b] - gone)
    assert not broken_B.any()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('block', [129, 1003])
def test_a_target_is_beside_itself_in_every_product(block, dtype):
    """Of items that are all alike each is last, whatever the product's rounding and its lanes."""
    draw = np.random.default_rng(1)
    query_BQD = jnp.asarray(draw.normal(size=(33, 1, 24)), dtype)
    item_VD = jnp.tile(jnp.asarray(draw.normal(size=(1, 24)), dtype), (1004, 1))
    target_B = jnp.asarray(draw.integers(1, 1004, 33), jnp.int32)
    none_BS = jnp.zeros((33, 2), jnp.int32)
    masked_B, unmasked_B, _ = in_blocks(query_BQD, item_VD, target_B, none_BS, only, block)
    assert (masked_B == 1003).all() and (unmasked_B == 1003).all()


@pytest.mark.parametrize('item', [1, 8, 10])
def test_a_nan_in_any_block_is_told(item):
    query_BQD, item_VD, target_B, seen_BS = make(4, 1, 10)
    for block in (3, 4):
        args = target_B, seen_BS, only, block
        assert in_blocks(query_BQD, item_VD.at[item].set(jnp.nan), *args)[2].all()
        found = in_blocks(query_BQD, item_VD.at[0].set(jnp.nan), *args)
        np.testing.assert_array_equal(found[:2], at_once(query_BQD, item_VD, *args[:3])[:2])
        assert not found[2].any()


def test_blocks_where_scores_would_be_many():
    """Up to 256 MiB all at once, which 1,024 users reach at 65,536 items; then 16 MiB a block."""
    assert evaluate.block_size(1024, 1, 65_536) == 0
    assert evaluate.block_size(1024, 1, 65_537) == 4096
    assert evaluate.block_size(64, 9, 1_000_000) == 2**24 // (4 * 576)
    assert evaluate.block_size(1024, 1, 1000, asked=999) == 999
    assert evaluate.block_size(1024, 1, 1000, asked=1000) == 0
    assert evaluate.block_size(2**20, 1, 1000) == 4
    assert evaluate.block_size(2**25, 1, 3) == 1


def test_rank_users_takes_blocks():
    table_VD, histories, targets = a_table(), [[1, 2, 3], [4, 2], [5]], [4, 1, 2]
    expected = judge(table_VD, histories, targets)
    chunks = held(histories, targets)
    args = scores_of_first, jnp.asarray(table_VD), jnp.eye(6), chunks, 3, only
    for eval_items in (1, 2, 4, 5, 99):
        np.testing.assert_array_equal(evaluate.rank_users(*args, eval_items), expected)


def test_memory_of_blocks_grows_neither_with_the_items_nor_with_the_users_scores():
    def temporaries(items):
        shapes = [((64, 1, 16), 'float32'), ((items + 1, 16), 'float32')]
        shapes += [((64,), 'int32'), ((64, 8), 'int32')]
        f = jax.jit(evaluate.rank_in_blocks, static_argnames=('combine', 'block'))
        arrays = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
        compiled = f.lower(*arrays, combine=only, block=1024).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    base = temporaries(100_000)
    assert base < 4 * 4 * 64 * 1024
    assert abs(temporaries(1_000_000) - base) < 2**16
