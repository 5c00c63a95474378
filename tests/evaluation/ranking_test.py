"""Ranks by hand and against a slow oracle, on one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import make_eval_batches
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax.data import eval_batches
from fame_jax.evaluation import ranking

INF = float('inf')
RANK = jax.jit(ranking.rank)


def ranks(scores, target, seen=()):
    """Masked and unmasked rank of one row; `scores` begins with item 1."""
    score_BV = jnp.array([[0.0, *scores]], jnp.float32)
    seen_BS = jnp.array([[*seen, 0, 0]], jnp.int32)
    masked_B, unmasked_B, is_nan_B = RANK(score_BV, jnp.array([target], jnp.int32), seen_BS)
    return int(masked_B[0]), int(unmasked_B[0]), bool(is_nan_B[0])


def slow_rank(scores, target, seen=()):
    """Sets the seen items to -inf and counts the items that score no less than the target."""
    scores = {item: -INF if item in seen else s for item, s in enumerate(scores, 1)}
    return 1 + sum(s >= scores[target] for item, s in scores.items() if item != target)


@pytest.mark.parametrize(
    ('scores', 'target', 'seen', 'masked', 'unmasked'),
    [
        ([3, 2, 1], 1, (), 1, 1),
        ([3, 2, 1], 3, (), 3, 3),
        ([3, 2, 1], 3, (1,), 2, 3),  # a seen item above does not count
        ([3, 2, 1], 1, (2, 3), 1, 1),  # seen items below change nothing
        ([2, 2, 1], 1, (), 2, 2),  # a tie counts against the target
        ([2, 2, 1], 1, (2,), 1, 2),  # unless it is masked
        ([5, 5, 5, 5], 2, (), 4, 4),  # equal scores: last
        ([5, 5, 5, 5], 2, (1, 3), 2, 4),
        ([3, 2, 1], 1, (1, 2), 3, 1),  # the target is a seen item: last under masking
        ([5, 5, 5], 2, (2,), 3, 3),
        ([-1, -2, -3], 1, (), 1, 1),  # the padding's score of 0 does not count
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


def test_a_target_of_minus_infinity_ties_with_masked_items():
    """They score -inf too, and a tie counts against the target."""
    assert slow_rank([-INF, 2, 3], 1, seen=(2,)) == 3
    assert ranks([-INF, 2, 3], 1, seen=(2,)) == (3, 3, False)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, INF]), min_size=6, max_size=6),
    st.integers(1, 6),
    st.sets(st.integers(1, 6)),
)
def test_masking_is_a_score_of_minus_infinity(scores, target, seen):
    padded = sorted(seen) + [0] * (6 - len(seen))
    masked, unmasked, is_nan = ranks(scores, target, padded)
    assert unmasked == slow_rank(scores, target)
    assert masked == (6 if target in seen else slow_rank(scores, target, seen))
    assert not is_nan


def test_many_rows_at_once():
    rng = np.random.default_rng(0)
    score_BV = rng.integers(-4, 5, (64, 31)).astype(np.float32)
    target_B = rng.integers(1, 31, 64).astype(np.int32)
    seen = [set(rng.integers(1, 31, 9).tolist()) for _ in range(64)]
    seen_BS = np.zeros((64, 12), np.int32)
    for row, items in zip(seen_BS, seen):
        row[rng.permutation(12)[: len(items)]] = sorted(items)  # zeros at any place
    masked_B, unmasked_B, is_nan_B = RANK(score_BV, target_B, seen_BS)
    for b in range(64):
        scores = score_BV[b, 1:].tolist()
        assert unmasked_B[b] == slow_rank(scores, target_B[b])
        assert masked_B[b] == slow_rank(scores, target_B[b], seen[b])
    assert not is_nan_B.any()


def test_the_padding_is_never_counted():
    seen_BS = jnp.array([[0, 1, 0]])
    for junk in (1e30, INF, float('nan')):
        score_BV = jnp.array([[junk, 3, 2, 1]], jnp.float32)
        masked_B, unmasked_B, is_nan_B = RANK(score_BV, jnp.array([3]), seen_BS)
        assert (masked_B[0], unmasked_B[0], is_nan_B[0]) == (2, 3, False)


@pytest.mark.parametrize('column', [1, 2, 3])
def test_a_nan_among_the_items_is_reported(column):
    scores = [3.0, 2.0, 1.0]
    scores[column - 1] = float('nan')
    assert ranks(scores, 2)[2]


def query_of_last(params, tokens_BL, positions_BL, segments_BL):
    """A model whose query is the row of its table for the last item."""
    return params[tokens_BL[:, -1:]]


def only(score_BQV):
    return score_BQV[:, 0]


def rank_by_table(table_VD, histories, targets, **options):
    """Ranks where the score of item v after item i is table_VD[i, v]."""
    table_VD = jnp.asarray(table_VD, jnp.float32)
    item_VD = jnp.eye(table_VD.shape[1])
    batches = make_eval_batches(histories, targets, **options)
    return ranking.rank_users(query_of_last, table_VD, item_VD, batches, len(histories), only)


def make_table():
    """Scores of 5 items after each of 5 items; row and column 0 are for the padding."""
    table_VD = np.zeros((6, 6), np.float32)
    for i in range(1, 6):
        table_VD[i, 1:] = [(v * i) % 7 for v in range(1, 6)]
    return table_VD


def test_rank_users_keeps_the_order_of_users():
    histories = [1, 2, 3], [4, 2], [5]  # batches start with the shortest
    targets = [4, 1, 2]
    table_VD = make_table()
    ranks = rank_by_table(table_VD, histories, targets)
    for user, (history, target) in enumerate(zip(histories, targets)):
        scores = table_VD[history[-1], 1:].tolist()
        assert ranks.masked[user] == slow_rank(scores, target, history)
        assert ranks.unmasked[user] == slow_rank(scores, target)
    assert ranks.masked.dtype == ranks.unmasked.dtype == np.int32


def test_masking_covers_items_before_the_model_s_window():
    table_VD = np.zeros((13, 13), np.float32)
    table_VD[12, 1:] = range(12, 0, -1)  # after item 12, item 1 scores highest and item 12 lowest
    ranks = rank_by_table(
        table_VD, [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]], [11], max_length=2, users=1
    )
    assert ranks.unmasked.tolist() == [11]
    assert ranks.masked.tolist() == [1]


@pytest.mark.parametrize('places', [1, 16, 64, 300])
def test_long_histories_in_small_batches_have_the_same_ranks(places, monkeypatch):
    """However few rows a batch has; histories of 1 to 200 items, with repeats."""
    draw = np.random.default_rng(places)
    table_VD = draw.integers(-9, 9, (301, 301))
    histories = [draw.integers(1, 301, length).tolist() for length in (3, 200, 18, 1, 65, 70, 4)]
    targets = draw.integers(1, 301, 7).tolist()
    monkeypatch.setattr(eval_batches, 'SEEN_PLACES', places)
    ranks = rank_by_table(table_VD, histories, targets, users=3)
    for user, (history, target) in enumerate(zip(histories, targets)):
        scores = table_VD[history[-1], 1:].tolist()
        masked = 300 if target in history else slow_rank(scores, target, history)
        assert ranks.masked[user] == masked
        assert ranks.unmasked[user] == slow_rank(scores, target)


def test_few_batches_are_in_memory_at_a_time(monkeypatch):
    """A batch is made when the ranks of an earlier one have been read."""
    monkeypatch.setattr(ranking, 'BATCHES_AHEAD', 2)
    histories, targets = [[1]] * 12, [2] * 12
    table_VD = jnp.asarray(make_table())
    made, read = [], []

    class Result:
        """A device's result that notes when the host reads it."""

        def __array__(self, dtype=None, copy=None):
            read.append(len(made))
            return np.zeros(2, np.int32)

    monkeypatch.setattr(ranking, '_rank_rows', lambda *args, **_: [Result()] * 3)

    def batches():
        for batch in make_eval_batches(histories, targets):
            made.append(batch)
            yield batch

    ranking.rank_users(query_of_last, table_VD, jnp.eye(6), batches(), 12, only)
    # Three results of each batch; the first one's when the third is under way.
    assert read == [3] * 3 + [4] * 3 + [5] * 3 + [6] * 9


def test_a_nan_is_an_error():
    table_VD = make_table()
    table_VD[2, 3] = float('nan')
    with pytest.raises(FloatingPointError, match='NaN'):
        rank_by_table(table_VD, [[1], [2], [3]], [4, 4, 4])


def test_a_nan_in_padding_is_ignored():
    histories, targets = [[1], [2], [3]], [4, 4, 4]
    clean = rank_by_table(make_table(), histories, targets)

    # In a padding row of the batch, whose last item is the padding.
    table_VD = make_table()
    table_VD[0] = float('nan')
    assert len(make_eval_batches(histories, targets)) == 2
    ranks = rank_by_table(table_VD, histories, targets)
    np.testing.assert_array_equal(ranks, clean)

    # In the padding's column.
    def encode(params, tokens_BL, positions_BL, segments_BL):
        return jnp.ones((len(tokens_BL), 1, 1))

    item_VD = jnp.array([[float('nan')], [3.0], [2.0], [1.0]])
    ranks = ranking.rank_users(
        encode, None, item_VD, make_eval_batches([[1], [2]], [3, 3]), 2, only
    )
    assert ranks.unmasked.tolist() == [3, 3]
    assert ranks.masked.tolist() == [2, 2]


def test_one_item_in_the_catalogue():
    ranks = rank_by_table([[0, 0], [0, 7]], [[1], [1]], [1, 1])
    assert ranks.masked.tolist() == ranks.unmasked.tolist() == [1, 1]


@pytest.mark.parametrize('rows', [1, 3, 7])
def test_scores_of_a_few_histories_at_a_time(rows, monkeypatch):
    """Three histories of two queries at a time; the last part is padded."""
    monkeypatch.setattr(ranking, 'QUERIES_AT_A_TIME', 6)
    draw = np.random.default_rng(rows)
    query_BQD, item_VD = draw.normal(size=(rows, 2, 4)), draw.normal(size=(5, 4))
    score_BV = ranking.scores(jnp.asarray(query_BQD), jnp.asarray(item_VD), lambda s: s.max(axis=1))
    expected_BV = (query_BQD @ item_VD.T).max(axis=1)
    np.testing.assert_allclose(score_BV, expected_BV, rtol=1e-5, atol=1e-6)


# Blocks of items.


def in_blocks(query_BQD, item_VD, target_B, seen_BS, combine, block):
    f = jax.jit(ranking.rank_in_blocks, static_argnames=('combine', 'block'))
    return f(query_BQD, item_VD, target_B, seen_BS, combine=combine, block=block)


def at_once(query_BQD, item_VD, target_B, seen_BS, combine):
    f = jax.jit(lambda *args: ranking.rank(ranking.scores(*args[:2], combine), *args[2:]))
    return f(query_BQD, item_VD, target_B, seen_BS)


def highest(score_BQV):
    return score_BQV.max(axis=1)


def make_inputs(rows, queries, items, seen=6, seed=0, rounded=False):
    """Queries, items, targets and seen items; every third item equals the one before."""
    draw = np.random.default_rng(seed)
    query_BQD = draw.normal(size=(rows, queries, 24))
    item_VD = draw.normal(size=(items + 1, 24))
    if rounded:  # exact products, many of them equal
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
def test_ranks_in_blocks_are_the_ranks(items, blocks, queries, combine):
    data = make_inputs(16, queries, items, rounded=True)
    expected = at_once(*data, combine)
    for block in blocks:
        for actual, wanted in zip(in_blocks(*data, combine, block), expected):
            np.testing.assert_array_equal(actual, wanted)
            assert actual.dtype == wanted.dtype


@pytest.mark.parametrize('block', [37, 1999])
@pytest.mark.parametrize(('queries', 'combine'), [(1, only), (3, highest)])
def test_equal_items_tie_to_the_last_bit(block, queries, combine):
    """Equal items have equal scores in whichever block they are."""
    query_BQD, item_VD, _, seen_BS = make_inputs(40, queries, 2000)
    # Item i + 1000 equals item i: another block, and another lane of the vector unit.
    item_VD = item_VD.at[1001:].set(item_VD[1:1001])
    target_B = jnp.arange(1, 41) * 50
    masked_B, unmasked_B, is_nan_B = in_blocks(
        query_BQD, item_VD, target_B, seen_BS, combine, block
    )
    score_BV = np.einsum(
        'BQD,VD->BQV', np.asarray(query_BQD, np.float64), np.asarray(item_VD, np.float64)
    )
    score_BV = np.asarray(combine(score_BV))
    for b, target in enumerate(np.asarray(target_B)):
        # In float64 equal items tie, and no others are close.
        is_tie_V = np.abs(score_BV[b, 1:] - score_BV[b, target]) < 1e-12
        assert is_tie_V.sum() >= 2
        assert (
            unmasked_B[b] == (score_BV[b, 1:] > score_BV[b, target] + 1e-12).sum() + is_tie_V.sum()
        )
        seen = {v for v in np.asarray(seen_BS)[b].tolist() if v}
        masked = sum(score_BV[b, v] > score_BV[b, target] - 1e-12 for v in seen)
        assert masked_B[b] == (2000 if target in seen else unmasked_B[b] - masked)
    assert not is_nan_B.any()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('block', [129, 1003])
def test_of_equal_items_each_is_last(block, dtype):
    """For every rounding of the product and every lane."""
    draw = np.random.default_rng(1)
    query_BQD = jnp.asarray(draw.normal(size=(33, 1, 24)), dtype)
    item_VD = jnp.tile(jnp.asarray(draw.normal(size=(1, 24)), dtype), (1004, 1))
    target_B = jnp.asarray(draw.integers(1, 1004, 33), jnp.int32)
    none_BS = jnp.zeros((33, 2), jnp.int32)
    masked_B, unmasked_B, _ = in_blocks(query_BQD, item_VD, target_B, none_BS, only, block)
    assert (masked_B == 1003).all() and (unmasked_B == 1003).all()


@pytest.mark.parametrize('item', [1, 8, 10])
def test_a_nan_in_any_block_is_reported(item):
    query_BQD, item_VD, target_B, seen_BS = make_inputs(4, 1, 10)
    for block in (3, 4):
        args = target_B, seen_BS, only, block
        assert in_blocks(query_BQD, item_VD.at[item].set(jnp.nan), *args)[2].all()
        *ranks, is_nan_B = in_blocks(query_BQD, item_VD.at[0].set(jnp.nan), *args)
        np.testing.assert_array_equal(ranks, at_once(query_BQD, item_VD, *args[:3])[:2])
        assert not is_nan_B.any()


def test_block_size_by_memory():
    """Up to 256 MiB of scores at once (1,024 users, 65,536 items), above that 16 MiB per block."""
    assert ranking.block_size(1024, 1, 65_536) == 0
    assert ranking.block_size(1024, 1, 65_537) == 4096
    assert ranking.block_size(64, 9, 1_000_000) == 2**24 // (4 * 576)
    assert ranking.block_size(2**20, 1, 1000) == 4
    assert ranking.block_size(2**25, 1, 3) == 1


@pytest.mark.parametrize('block', [1, 2, 4, 5, 99])
def test_rank_local_takes_any_block(block):
    data = make_inputs(16, 1, 5, rounded=True)
    rank_local = jax.jit(partial(ranking.rank_local, combine=only, num_items=5, block=block))
    for actual, wanted in zip(rank_local(*data), at_once(*data, only)):
        np.testing.assert_array_equal(actual, wanted)


def test_rank_users_in_blocks_where_memory_asks_for_them(monkeypatch):
    table_VD, histories, targets = make_table(), [[1, 2, 3], [4, 2], [5]], [4, 1, 2]
    expected = rank_by_table(table_VD, histories, targets)
    in_blocks = []
    monkeypatch.setattr(ranking, 'SCORES_AT_ONCE', 1)
    monkeypatch.setattr(ranking, 'SCORES_IN_BLOCK', 2 * 4 * 2)  # two users, two items
    rank_in_blocks = ranking.rank_in_blocks

    def spy(*args, **options):
        in_blocks.append(args[5])
        return rank_in_blocks(*args, **options)

    monkeypatch.setattr(ranking, 'rank_in_blocks', spy)

    def encode(*args):  # another function object: programs are cached by it
        return query_of_last(*args)

    batches = make_eval_batches(histories, targets)
    ranks = ranking.rank_users(encode, jnp.asarray(table_VD), jnp.eye(6), batches, 3, only)
    np.testing.assert_array_equal(ranks, expected)
    assert set(in_blocks) == {2}


def test_memory_of_blocks_does_not_grow_with_the_items():
    def temporaries(items):
        shapes = [((64, 1, 16), 'float32'), ((items + 1, 16), 'float32')]
        shapes += [((64,), 'int32'), ((64, 8), 'int32')]
        f = jax.jit(ranking.rank_in_blocks, static_argnames=('combine', 'block'))
        arrays = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
        compiled = f.lower(*arrays, combine=only, block=1024).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    base = temporaries(100_000)
    assert base < 4 * 4 * 64 * 1024
    assert abs(temporaries(1_000_000) - base) < 2**16
