"""The losses against explicit float64 loops, against each other, and against their own promises."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fame_jax import losses


def make(tokens, items, width=8, seed=0, scale=1.0):
    """Random queries, table, targets and weights; some weights are 0, and there the target too."""
    rng = np.random.default_rng(seed)
    query_TD = (scale * rng.normal(size=(tokens, width))).astype(np.float32)
    item_VD = rng.normal(size=(items + 1, width)).astype(np.float32)
    target_T = rng.integers(1, items + 1, tokens).astype(np.int32)
    weight_T = rng.choice([0.0, 0.5, 1.0], tokens, p=[0.2, 0.2, 0.6]).astype(np.float32)
    return query_TD, item_VD, np.where(weight_T > 0, target_T, 0), weight_T


# Cached, as is `gradient`, so that tests of one shape share one compilation.
@cache
def chunked(chunk_tokens, chunk_items):
    return partial(losses.chunked_cross_entropy, chunk_tokens=chunk_tokens, chunk_items=chunk_items)


@cache
def gradient(loss, compiled=True):
    f = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(f) if compiled else f


def graded(loss, *args, compiled=True):
    """(sum, count, gradient of the queries, gradient of the table)."""
    (total, count), grads = gradient(loss, compiled)(*map(jnp.asarray, args))
    return total, count, *grads


def by_loop(query_TD, item_VD, target_T, weight_T):
    """The full softmax, a token and an item at a time, in float64."""
    query_TD, item_VD = np.asarray(query_TD, np.float64), np.asarray(item_VD, np.float64)
    total, d_query_TD, d_item_VD = 0.0, np.zeros(query_TD.shape), np.zeros(item_VD.shape)
    for t, (query_D, target, weight) in enumerate(zip(query_TD, target_T, weight_T)):
        if weight == 0:
            continue
        scores = [float(query_D @ item_D) for item_D in item_VD[1:]]
        largest = max(scores)
        sum_exp = sum(math.exp(s - largest) for s in scores)
        total += weight * (largest + math.log(sum_exp) - scores[target - 1])
        for v, score in enumerate(scores, start=1):
            slope = weight * (math.exp(score - largest) / sum_exp - (v == target))
            d_query_TD[t] += slope * item_VD[v]
            d_item_VD[v] += slope * query_D
    return total, float(np.sum(weight_T)), d_query_TD, d_item_VD


def assert_close(actual, expected, bound=1e-5):
    """Within `bound` of the largest entry, number by number: absolute for small, never for NaN."""
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=0, atol=bound * max(1.0, np.abs(e).max(initial=0)))


FULL = {
    'plain': losses.cross_entropy,
    'tokens': chunked(3, 0),
    'both': chunked(5, 4),
}


@pytest.fixture(params=FULL)
def full(request):
    """Each way to the full softmax: all in memory, and in chunks of either axis or both."""
    return FULL[request.param]


# Full cross-entropy.


def test_three_equal_items_cost_log_3(full):
    total, count, d_query, d_item = graded(
        full, np.ones((1, 2)), np.ones((4, 2)), np.array([2]), np.ones(1)
    )
    # p = 1/3 each; the query's gradient is sum_v p_v x_v - x_2 = 0, an item's is p_v - [v = 2].
    np.testing.assert_allclose(total, math.log(3), rtol=1e-6)
    assert count == 1
    np.testing.assert_allclose(d_query, np.zeros((1, 2)), atol=1e-6)
    np.testing.assert_allclose(d_item[:, 0], [0, 1 / 3, 1 / 3 - 1, 1 / 3], rtol=1e-6)


def test_two_items_at_odds_of_three_to_one(full):
    item_VD = np.array([[9.0], [0.0], [math.log(3)]])
    total, count, d_query, d_item = graded(
        full, np.ones((2, 1)), item_VD, np.array([1, 2]), np.array([1.0, 10.0])
    )
    np.testing.assert_allclose(total, math.log(4) + 10 * math.log(4 / 3), rtol=1e-6)
    assert count == 11
    slope = np.array([0, (1 / 4 - 1) + 10 / 4, 3 / 4 + 10 * (3 / 4 - 1)])
    np.testing.assert_allclose(d_item[:, 0], slope, rtol=1e-5)
    expected = [3 / 4 * math.log(3), 10 * (3 / 4 - 1) * math.log(3)]
    np.testing.assert_allclose(d_query[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize('tokens, items', [(1, 1), (7, 10), (12, 37)])
def test_equals_a_loop_in_float64(full, tokens, items):
    data = make(tokens, items, scale=2.0)
    assert_close(graded(full, *data), by_loop(*data))


@pytest.mark.parametrize('items', [1, 2, 5, 97, 1000, 2049])
def test_chunks_do_not_change_the_loss(items):
    data = make(53, items, scale=2.0)
    expected = graded(losses.cross_entropy, *data)
    # Chunks of one item need the most turns, and where there are few items other sizes clip to it.
    sizes = [(7, 7), (0, 64)] + [(64, 1), (1, 0), (5000, 5000)] * (items == 97)
    for size in sizes:
        assert_close(graded(chunked(*size), *data), expected)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 9),
    items=st.integers(1, 23),
    width=st.integers(1, 5),
    chunk_tokens=st.integers(0, 10),
    chunk_items=st.integers(0, 25),
    seed=st.integers(0, 99),
)
def test_any_chunks_of_any_shape(tokens, items, width, chunk_tokens, chunk_items, seed):
    data = make(tokens, items, width, seed)
    assert_close(graded(chunked(chunk_tokens, chunk_items), *data), by_loop(*data))


@cache
def counted(chunk_tokens, chunk_items):
    """Of (queries, table, targets, weights, num_tokens)."""
    loss = chunked(chunk_tokens, chunk_items)
    return lambda *args: loss(*args[:-1], num_tokens=args[-1])


@pytest.mark.parametrize('size', [(3, 0), (0, 0), (3, 4)])
@pytest.mark.parametrize('number', [0, 1, 3, 4, 7])
def test_tokens_from_a_number_on_are_left_out(size, number):
    query_TD, item_VD, target_T, weight_T = make(7, 10, seed=1)
    weight_T = np.where(np.arange(7) < number, weight_T, 0)
    actual = graded(counted(*size), query_TD, item_VD, target_T, weight_T, np.int32(number))
    assert_close(actual, by_loop(query_TD, item_VD, target_T, weight_T))


def test_tokens_from_a_number_on_are_not_multiplied():
    """Their queries hold NaN; the chunk of the last that counts is looked at to its end."""
    query_TD, item_VD, _, _ = make(7, 10)
    target_T, weight_T = np.full(7, 2, np.int32), np.eye(7, dtype=np.float32)[0]
    query_TD[3:] = np.nan
    loss = counted(3, 0)
    _, _, d_query, _ = graded(loss, query_TD, item_VD, target_T, weight_T, np.int32(1))
    _, _, expected, _ = by_loop(query_TD, item_VD, target_T, weight_T)
    assert_close([d_query], [expected])


@pytest.mark.parametrize('target', [6, 7, 8, 9, 10])
def test_target_anywhere_in_the_overlapping_last_chunk(target):
    # Ten items by four: 1-4, 5-8, then 7-10, of which 7 and 8 are not to be counted again.
    query_TD, item_VD, _, _ = make(5, 10)
    data = query_TD, item_VD, np.full(5, target), np.array([1, 2, 0, 1, 3], np.float32)
    for loss in (chunked(0, 4), chunked(2, 4), chunked(2, 0)):
        assert_close(graded(loss, *data), by_loop(*data))


def test_weights_of_zero(full):
    query_TD, item_VD, target_T, _ = make(7, 10)
    for result in graded(full, query_TD, item_VD, target_T, np.zeros(7, np.float32)):
        np.testing.assert_array_equal(result, np.zeros(result.shape))


def test_gradient_of_the_weights(full):
    query_TD, item_VD, target_T, weight_T = make(7, 10)
    target_T = np.maximum(target_T, 1)

    inputs = jnp.asarray(query_TD), jnp.asarray(item_VD), jnp.asarray(target_T)

    def mean(weight_T):
        total, count = full(*inputs, weight_T)
        return total / count

    each = [by_loop(query_TD[[t]], item_VD, target_T[[t]], np.ones(1))[0] for t in range(7)]
    count = weight_T.sum()
    expected = (each - np.dot(each, weight_T) / count) / count
    np.testing.assert_allclose(jax.jit(jax.grad(mean))(weight_T), expected, atol=1e-6)


def test_the_gradient_is_scaled_by_what_follows(full):
    data = make(7, 10)
    mean = jax.grad(lambda *args: jnp.divide(*full(*args)), argnums=(0, 1))
    _, count, *grads = by_loop(*data)
    assert_close(mean(*map(jnp.asarray, data)), [grad / count for grad in grads])


def test_scores_of_ten_thousand(full):
    # Scores 1e4, 0, -1e4, 1e4, 0: half of the probability is on the first and the fourth.
    item_VD = np.array([[100.0], [100.0], [0.0], [-100.0], [100.0], [0.0]])
    total, _, d_query, d_item = graded(
        full, np.full((3, 1), 100.0), item_VD, np.array([1, 2, 3]), np.array([1.0, 1.0, 1.0])
    )
    np.testing.assert_allclose(total, 0 + 1e4 + 2e4 + 3 * math.log(2), rtol=1e-6)
    np.testing.assert_allclose(d_query[:, 0], [0, 100, 200], atol=0.2)
    np.testing.assert_allclose(d_item[:, 0], [0, 50, -100, -100, 150, 0], atol=0.2)


@pytest.mark.parametrize('junk', [1e30, -1e30, np.inf, np.nan])
def test_the_row_of_the_padding_is_never_read(full, junk):
    query_TD, item_VD, target_T, weight_T = make(12, 10)
    assert (target_T == 0).any()
    filled_VD = item_VD.copy()
    filled_VD[0] = junk
    result = graded(full, query_TD, filled_VD, target_T, weight_T)
    assert_close(result, by_loop(query_TD, item_VD, target_T, weight_T))
    np.testing.assert_array_equal(result[3][0], np.zeros(item_VD.shape[1]))


@pytest.mark.parametrize('loss', [losses.cross_entropy, chunked(16, 0), chunked(16, 32)])
def test_bfloat16_is_multiplied_as_it_is_and_summed_in_float32(loss):
    query_TD, item_VD, target_T, weight_T = make(64, 300, 32)
    query_TD, item_VD = query_TD.astype(jnp.bfloat16), item_VD.astype(jnp.bfloat16)
    result = graded(loss, query_TD, item_VD, target_T, weight_T)
    expected = by_loop(query_TD, item_VD, target_T, weight_T)
    assert result[0].dtype == result[1].dtype == jnp.float32
    assert result[2].dtype == result[3].dtype == jnp.bfloat16
    # The value knows no rounding but float32's; a gradient is made of probabilities rounded once
    # (2^-9) and is itself rounded once or twice more.
    assert_close(result[:2], expected[:2], bound=1e-5)
    assert_close(result[2:], expected[2:], bound=3 * 2**-9)


@pytest.mark.parametrize('loss', [losses.cross_entropy, chunked(2, 0), chunked(2, 2)])
def test_bfloat16_gradients_add_up_over_many_chunks(loss):
    # A bfloat16 sum of equal terms stops growing at 256 of them. Here 1200 tokens each pull item 1
    # by 3/4 and push the others by 1/4, all exact in bfloat16.
    ones = np.ones((1200, 1), jnp.bfloat16)
    item_VD = np.ones((5, 1), jnp.bfloat16)
    _, _, _, d_item = graded(loss, ones, item_VD, np.ones(1200, np.int32), np.ones(1200))
    np.testing.assert_array_equal(np.asarray(d_item, np.float32)[:, 0], [0, -900, 300, 300, 300])
    # And 1200 items: the query's gradient climbs to the mean of x_v, then loses the last of them.
    item_VD = np.full((1201, 1), 2, jnp.bfloat16)
    item_VD[1200] = 1
    query_TD = np.zeros((3, 1), jnp.bfloat16)
    _, _, d_query, _ = graded(loss, query_TD, item_VD, np.full(3, 1200), np.ones(3))
    np.testing.assert_allclose(np.asarray(d_query, np.float32), 1 - 1 / 1200, rtol=2**-8)


def test_without_jit(full):
    data = make(7, 10)
    assert_close(graded(full, *data, compiled=False), graded(full, *data), bound=1e-6)


def test_the_value_alone_is_the_value(full):
    data = make(7, 10)
    assert_close(full(*map(jnp.asarray, data)), by_loop(*data)[:2])


def test_under_vmap(full):
    rows = [make(7, 10, seed=seed) for seed in range(3)]
    stacked = [jnp.stack(column) for column in zip(*rows)]
    grad = jax.vmap(jax.value_and_grad(lambda *args: full(*args)[0], argnums=(0, 1)))
    totals, grads = jax.jit(grad)(*stacked)
    for i, row in enumerate(rows):
        total, _, *expected = by_loop(*row)
        assert_close([totals[i], *(g[i] for g in grads)], [total, *expected])


def test_under_scan_and_checkpoint_with_donated_parameters(full):
    """A block of training steps as the loop takes them: scanned, donated, rematerialised."""
    batches = [make(7, 10, seed=seed) for seed in range(3)]

    def step(item_VD, batch):
        @jax.checkpoint
        def mean(item_VD):
            query_TD = jnp.tanh(batch[0] @ item_VD[1:9])
            return jnp.divide(*full(query_TD, item_VD, batch[1], batch[2]))

        value, grad = jax.value_and_grad(mean)(item_VD)
        return item_VD - 0.1 * grad, value

    start = batches[0][1]
    inputs = [(query, target, weight) for query, _, target, weight in batches]
    stacked = [jnp.stack(column) for column in zip(*inputs)]
    block = jax.jit(lambda item, batches: jax.lax.scan(step, item, batches), donate_argnums=0)
    donated = jnp.array(start)
    item_VD, values = block(donated, stacked)
    assert donated.is_deleted()

    def naive(item_VD, query, target, weight):
        query_TD = jnp.tanh(query @ item_VD[1:9])
        logp_TV = jax.nn.log_softmax(query_TD @ item_VD[1:].T)
        return -(logp_TV[jnp.arange(7), target - 1] * weight).sum() / weight.sum()

    expected_VD, expected = jnp.asarray(start), []
    for batch in inputs:
        value, grad = jax.value_and_grad(naive)(expected_VD, *batch)
        expected_VD = expected_VD - 0.1 * grad
        expected.append(value)
    assert_close([item_VD, values], [expected_VD, expected])


def temporaries(loss, tokens, items, width=64):
    """Bytes that the compiled gradient needs beside its inputs and outputs."""
    shapes = [((tokens, width), 'float32'), ((items + 1, width), 'float32')]
    shapes += [((tokens,), 'int32'), ((tokens,), 'float32')]
    f = jax.jit(jax.grad(lambda *args: loss(*args)[0], argnums=(0, 1)))
    compiled = f.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_of_chunks_grows_neither_with_the_items_nor_with_tokens_times_items():
    loss = chunked(128, 1024)
    base = temporaries(loss, 512, 10_000)
    assert base < 4 * 512 * 10_000 / 10
    assert abs(temporaries(loss, 512, 80_000) - base) < 2**16
    # Tokens have a few [T, D] of their own.
    assert temporaries(loss, 4096, 80_000) - base < 3 * 4 * 4096 * 64
    assert temporaries(loss, 4096, 80_000) < 4 * 4096 * 80_000 / 100


def test_memory_of_chunks_of_tokens_grows_with_the_chunk():
    table = 4 * 20_000 * 64
    assert temporaries(chunked(128, 0), 1024, 20_000) < 4 * 128 * 20_000 + 4 * table


def test_memory_of_the_plain_loss_is_one_array_of_logits():
    assert temporaries(losses.cross_entropy, 512, 20_000) < 1.3 * 4 * 512 * 20_000


@pytest.mark.parametrize('sizes', [(-1, 0), (0, -1)])
def test_a_negative_chunk_is_refused(sizes):
    with pytest.raises(ValueError, match='chunks must be >= 0'):
        chunked(*sizes)(*make(4, 5))


# Cross-entropy of several queries a token.


def highest(score_TQV):
    return score_TQV.max(axis=1)


def mixture(score_TQV):
    """Combined in another way: every query has its part."""
    return jax.nn.logsumexp(score_TQV, axis=1)


@cache
def combined(combine, chunk_tokens):
    return partial(losses.combined_cross_entropy, combine=combine, chunk_tokens=chunk_tokens)


def make_several(tokens, queries, items, **options):
    """Data as of `make`, with several queries a token."""
    query_SD, item_VD, target_S, weight_S = make(tokens * queries, items, **options)
    query_TQD = query_SD.reshape(tokens, queries, -1)
    return query_TQD, item_VD, target_S[::queries], weight_S[::queries]


def highest_by_loop(query_TQD, item_VD, target_T, weight_T):
    """For each item its best query; the loss of one query, an item at a time, in float64."""
    query_TQD, item_VD = np.asarray(query_TQD, np.float64), np.asarray(item_VD, np.float64)
    total, d_query_TQD, d_item_VD = 0.0, np.zeros(query_TQD.shape), np.zeros(item_VD.shape)
    for t, (query_QD, target, weight) in enumerate(zip(query_TQD, target_T, weight_T)):
        if weight == 0:
            continue
        best = [max(range(len(query_QD)), key=lambda q: query_QD[q] @ x_D) for x_D in item_VD[1:]]
        scores = [float(query_QD[q] @ x_D) for q, x_D in zip(best, item_VD[1:])]
        log_all = math.log(sum(math.exp(score) for score in scores))
        total += weight * (log_all - scores[target - 1])
        for v, (q, score) in enumerate(zip(best, scores), start=1):
            slope = weight * (math.exp(score - log_all) - (v == target))
            d_query_TQD[t, q] += slope * item_VD[v]
            d_item_VD[v] += slope * query_QD[q]
    return total, float(np.sum(weight_T)), d_query_TQD, d_item_VD


@pytest.mark.parametrize('chunk_tokens', [0, 1, 6, 8, 99])
def test_the_highest_of_several_queries_against_a_loop(chunk_tokens):
    # Seven tokens of three queries: chunks of all, one, two (the last overlaps), two, and all.
    data = make_several(7, 3, 10)
    assert_close(graded(combined(highest, chunk_tokens), *data), highest_by_loop(*data))


def test_one_query_is_the_plain_loss():
    query_TD, item_VD, target_T, weight_T = make(7, 10)
    expected = by_loop(query_TD, item_VD, target_T, weight_T)
    total, count, d_query, d_item = graded(
        combined(highest, 2), query_TD[:, None], item_VD, target_T, weight_T
    )
    assert_close((total, count, d_query[:, 0], d_item), expected)


def test_any_way_to_combine_queries_is_differentiated():
    data = make_several(7, 3, 10)

    def naive(query_TQD, item_VD, target_T, weight_T):
        score_TV = mixture(jnp.einsum('TQD,VD->TQV', query_TQD, item_VD[1:]))
        logp_TV = jax.nn.log_softmax(score_TV)
        return -(logp_TV[jnp.arange(7), target_T - 1] * weight_T).sum(), weight_T.sum()

    assert_close(graded(combined(mixture, 4), *data), graded(naive, *data))


def test_repeated_queries_change_nothing_but_share_the_gradient():
    query_TQD, item_VD, target_T, weight_T = make_several(7, 3, 10)
    total, count, d_query, d_item = highest_by_loop(query_TQD, item_VD, target_T, weight_T)
    repeated_TQD = np.concatenate([query_TQD, query_TQD[:, :1]], axis=1)
    result = graded(combined(highest, 8), repeated_TQD, item_VD, target_T, weight_T)
    assert_close((*result[:2], result[3]), (total, count, d_item))
    assert_close(
        [result[2][:, 0] + result[2][:, 3], result[2][:, 1:3]], [d_query[:, 0], d_query[:, 1:]]
    )


@pytest.mark.parametrize('junk', [1e30, np.inf, np.nan])
def test_several_queries_never_read_the_row_of_the_padding(junk):
    query_TQD, item_VD, target_T, weight_T = make_several(7, 3, 10)
    assert (target_T == 0).any()
    expected = highest_by_loop(query_TQD, item_VD, target_T, weight_T)
    item_VD[0] = junk
    result = graded(combined(highest, 6), query_TQD, item_VD, target_T, weight_T)
    assert_close(result, expected)
    assert not np.any(result[3][0])


def test_several_queries_of_bfloat16_are_summed_in_float32():
    query_TQD, item_VD, target_T, weight_T = make_several(20, 3, 30, width=32)
    query_TQD, item_VD = query_TQD.astype(jnp.bfloat16), item_VD.astype(jnp.bfloat16)
    result = graded(combined(highest, 9), query_TQD, item_VD, target_T, weight_T)
    expected = highest_by_loop(query_TQD, item_VD, target_T, weight_T)
    assert result[0].dtype == jnp.float32
    assert result[2].dtype == result[3].dtype == jnp.bfloat16
    assert_close(result[:2], expected[:2])
    assert_close(result[2:], expected[2:], bound=3 * 2**-9)


def test_memory_of_several_queries_grows_with_the_chunk_alone():
    def temporaries_of(tokens):
        shapes = [((tokens, 9, 64), 'float32'), ((5001, 64), 'float32')]
        shapes += [((tokens,), 'int32'), ((tokens,), 'float32')]
        f = jax.jit(jax.grad(lambda *args: combined(highest, 72)(*args)[0], argnums=(0, 1)))
        compiled = f.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # A query's gradient is formed with the value and scaled later, at most once more in between.
    assert temporaries_of(512) - temporaries_of(64) < 2 * 4 * (512 - 64) * 9 * 64


def test_a_negative_chunk_of_queries_is_refused():
    with pytest.raises(ValueError, match='chunk_tokens must be >= 0'):
        combined(highest, -1)(*make_several(4, 2, 5))


# Binary cross-entropy.


def binary_by_loop(query_TD, item_VD, target_T, negative_TR, weight_T, negative_weight_TR):
    query_TD, item_VD = np.asarray(query_TD, np.float64), np.asarray(item_VD, np.float64)
    total, d_query_TD, d_item_VD = 0.0, np.zeros(query_TD.shape), np.zeros(item_VD.shape)

    def add(t, v, share, sign):
        score = sign * float(query_TD[t] @ item_VD[v])
        slope = -share * sign / (1 + math.exp(score))
        d_query_TD[t] += slope * item_VD[v]
        d_item_VD[v] += slope * query_TD[t]
        return share * math.log1p(math.exp(-score))

    for t, weight in enumerate(weight_T):
        if weight == 0:
            continue
        total += add(t, target_T[t], weight, 1)
        valid = [v for v, w in zip(negative_TR[t], negative_weight_TR[t]) if w]
        total += sum(add(t, v, weight / len(valid), -1) for v in valid)
    return total, float(np.sum(weight_T)), d_query_TD, d_item_VD


def make_negatives(tokens, items, negatives, seed=1):
    rng = np.random.default_rng(seed)
    valid_TR = (rng.uniform(size=(tokens, negatives)) < 0.6).astype(np.float32)
    negative_TR = rng.integers(1, items + 1, valid_TR.shape)
    return np.where(valid_TR > 0, negative_TR, 0), valid_TR


def test_a_binary_loss_of_scores_zero_is_twice_log_2():
    zero, one = np.zeros((1, 2)), np.ones((1, 3))
    args = zero, np.ones((5, 2)), np.array([1]), np.array([[2, 3, 4]]), np.ones(1), one
    total, count, d_query, _ = graded(losses.binary_cross_entropy, *args)
    np.testing.assert_allclose([total, count], [2 * math.log(2), 1], rtol=1e-6)
    np.testing.assert_allclose(d_query, [[-1 / 2 + 1 / 2] * 2], atol=1e-7)


@pytest.mark.parametrize('negatives', [1, 4])
def test_the_binary_loss_equals_a_loop_in_float64(negatives):
    query_TD, item_VD, target_T, weight_T = make(20, 9)
    negative_TR, valid_TR = make_negatives(20, 9, negatives)
    assert (valid_TR.sum(axis=1) == 0).any()  # Some tokens have no valid negative at all.
    args = target_T, negative_TR, weight_T, valid_TR
    expected = binary_by_loop(query_TD, item_VD, *args)
    item_VD[0] = np.nan
    assert_close(graded(losses.binary_cross_entropy, query_TD, item_VD, *args), expected)


def test_the_binary_loss_of_scores_of_ten_thousand():
    item_VD = np.array([[0.0], [-100.0], [100.0]])
    args = np.array([[100.0]]), item_VD, np.array([1]), np.array([[2]]), np.ones(1), np.ones((1, 1))
    total, _, d_query, d_item = graded(losses.binary_cross_entropy, *args)
    np.testing.assert_allclose(total, 1e4 + 1e4)
    np.testing.assert_allclose(d_query, [[100 + 100]])
    np.testing.assert_allclose(d_item, [[0], [-100], [100]])


# Sampled cross-entropy.


def test_all_items_as_negatives_make_the_full_softmax():
    data = make(12, 10)
    query_TD, item_VD, target_T, weight_T = data
    shared_R = np.arange(1, 11)
    for negative in (shared_R, np.tile(shared_R, (12, 1))):
        result = graded(
            losses.sampled_cross_entropy, query_TD, item_VD, target_T, negative, weight_T
        )
        assert_close(result, by_loop(*data))


def test_a_sampled_loss_by_hand():
    # Scores 0, log 2, log 3; the target is item 1 and is also drawn, once, without effect.
    item_VD = np.array([[np.nan], [0.0], [math.log(2)], [math.log(3)]])
    args = np.ones((1, 1)), item_VD, np.array([1]), np.array([2, 3, 1]), np.ones(1)
    sampled = losses.sampled_cross_entropy
    np.testing.assert_allclose(sampled(*args), [math.log(1 + 2 + 3), 1], rtol=1e-6)
    # Negatives of weight 0 are out.
    weight_TR = np.array([[1.0, 0.0, 1.0]])
    np.testing.assert_allclose(sampled(*args, negative_weight_TR=weight_TR)[0], math.log(1 + 2))
    # Three draws; each counts by its probability, the target by itself.
    log_q_R = np.log([1 / 2, 1 / 4, 1 / 4])
    expected = math.log(1 + 2 / (3 / 2) + 3 / (3 / 4))
    np.testing.assert_allclose(sampled(*args, log_q=log_q_R)[0], expected, rtol=1e-6)
    own = args[:3], np.array([[2, 3, 1]]), args[4]
    total, _ = sampled(*own[0], *own[1:], log_q=log_q_R[None])
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_nothing_but_the_target_drawn_costs_nothing():
    query_TD, item_VD, _, _ = make(3, 5)
    args = query_TD, item_VD, np.full(3, 2), np.full(4, 2), np.ones(3)
    total, _, d_query, d_item = graded(losses.sampled_cross_entropy, *args)
    for result in (total, d_query, d_item):
        np.testing.assert_allclose(result, np.zeros(result.shape), atol=1e-6)


def test_padding_is_never_read_where_negatives_are_drawn():
    query_TD, item_VD, target_T, weight_T = make(20, 9)
    negative_TR, valid_TR = make_negatives(20, 9, 4)
    sampled = partial(losses.sampled_cross_entropy, negative_weight_TR=valid_TR)
    args = target_T, negative_TR, weight_T
    expected = graded(sampled, query_TD, item_VD, *args)
    item_VD[0] = np.nan
    assert_close(graded(sampled, query_TD, item_VD, *args), expected)
    # Nine items are drawn alike, four times: a weight of 9 / 4 each.
    log_q_TR = np.full((20, 4), math.log(1 / 9), np.float32)
    scores = query_TD @ np.nan_to_num(item_VD).T
    expected = 0.0
    for t in range(20):
        own = scores[t, target_T[t]]
        valid = [v for v, w in zip(negative_TR[t], valid_TR[t]) if w and v != target_T[t]]
        drawn = sum(math.exp(scores[t, v] - own) for v in valid)
        expected += float(weight_T[t]) * math.log(1 + 9 / 4 * drawn)
    total, _ = sampled(query_TD, item_VD, *args, log_q=log_q_TR)
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_sampled_losses_of_bfloat16_are_summed_in_float32():
    query_TD, item_VD, target_T, weight_T = make(12, 10, 32)
    query_TD, item_VD = query_TD.astype(jnp.bfloat16), item_VD.astype(jnp.bfloat16)
    exact = query_TD.astype(np.float32), item_VD.astype(np.float32)
    shared = target_T, np.arange(1, 11), weight_T
    own = target_T, np.tile(np.arange(1, 11), (12, 1)), weight_T, np.ones((12, 10), np.float32)
    for loss, args in [
        (losses.sampled_cross_entropy, shared),
        (losses.sampled_cross_entropy, own[:3]),
        (losses.binary_cross_entropy, own),
    ]:
        total, count, *grads = graded(loss, query_TD, item_VD, *args)
        assert_close([total, count], loss(*map(jnp.asarray, (*exact, *args))))
        assert [grad.dtype for grad in grads] == [jnp.bfloat16] * 2


def test_negatives_are_uniform_over_the_items(key):
    drawn = losses.draw_negatives(key, (300, 200), 6)
    assert drawn.shape == (300, 200)
    assert drawn.dtype == jnp.int32
    counts = np.bincount(np.ravel(drawn), minlength=7)
    assert counts[0] == 0
    assert counts.sum() == counts[1:7].sum() == 60_000
    # Five standard deviations of a binomial of 60,000 and 1/6.
    np.testing.assert_allclose(counts[1:], 10_000, atol=5 * math.sqrt(60_000 * 1 / 6 * 5 / 6))
    np.testing.assert_array_equal(losses.draw_negatives(key, (300, 200), 6), drawn)
    assert (losses.draw_negatives(key, (5,), 1) == 1).all()


# Supervised contrast.


def contrast_by_loop(vector_BK, weight_BB, compared_BB, temperature):
    """A pair at a time, in float64."""
    total, count = 0.0, 0
    for i, anchor in enumerate(np.asarray(vector_BK, np.float64)):
        others = [a for a in range(len(vector_BK)) if a != i and compared_BB[i, a]]
        logit = {a: float(anchor @ vector_BK[a]) / temperature for a in others}
        positives = [p for p in others if weight_BB[i, p] > 0]
        if not positives:
            continue
        log_all = math.log(sum(math.exp(s) for s in logit.values()))
        lost = sum(weight_BB[i, p] * (log_all - logit[p]) for p in positives)
        total += lost / sum(weight_BB[i, p] for p in positives)
        count += 1
    return total, count


def unit_vectors(batch, width, seed):
    vector_BK = np.random.default_rng(seed).normal(size=(batch, width))
    return (vector_BK / np.linalg.norm(vector_BK, axis=1, keepdims=True)).astype(np.float32)


def everyone(batch):
    return np.ones((batch, batch), bool)


label_sets = st.lists(st.lists(st.integers(0, 4), max_size=3, unique=True), min_size=1, max_size=7)


def slots(sets):
    """Label sets as label_BS."""
    label_BS = np.full((len(sets), max(1, *map(len, sets))), -1, np.int32)
    for i, labels in enumerate(sets):
        label_BS[i, : len(labels)] = sorted(labels)
    return label_BS


@settings(max_examples=30, deadline=None)
@given(label_sets, st.integers(0, 100))
def test_label_overlap_and_contrast_against_loops(sets, seed):
    weight_BB = np.array(
        [[len({*a} & {*b}) / max(len({*a} | {*b}), 1) for b in sets] for a in sets], np.float32
    )
    np.testing.assert_allclose(losses.label_overlap(slots(sets)), weight_BB, rtol=1e-6)
    vector_BK = unit_vectors(len(sets), 3, seed)
    compared_BB = np.random.default_rng(seed).random(weight_BB.shape) < 0.7
    expected = contrast_by_loop(vector_BK, weight_BB, compared_BB, 0.5)
    found = losses.supervised_contrastive(vector_BK, weight_BB, compared_BB, 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_contrast_of_four_items_by_hand():
    """Two labels of two items, at right angles: each anchor's others are 1, 0 and 0 away."""
    vector_BK = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    weight_BB = losses.label_overlap(np.array([[0], [0], [1], [1]]))
    total, count = losses.supervised_contrastive(vector_BK, weight_BB, everyone(4), 0.5)
    assert count == 4
    np.testing.assert_allclose(total, 4 * (math.log(math.e**2 + 2) - 2), rtol=1e-6)
    # The labels the other way round: each positive is as far as can be.
    weight_BB = losses.label_overlap(np.array([[0], [1], [0], [1]]))
    total, _ = losses.supervised_contrastive(vector_BK, weight_BB, everyone(4), 0.5)
    np.testing.assert_allclose(total, 4 * math.log(math.e**2 + 2), rtol=1e-6)
    # An item of both labels is half a positive to either; the fourth has none and is not counted.
    label_BS = np.array([[0, -1], [0, 1], [1, -1], [-1, -1]])
    weight_BB = losses.label_overlap(label_BS)
    np.testing.assert_array_equal(
        weight_BB, [[1, 1 / 2, 0, 0], [1 / 2, 1, 1 / 2, 0], [0, 1 / 2, 1, 0], [0, 0, 0, 0]]
    )
    total, count = losses.supervised_contrastive(vector_BK, weight_BB, everyone(4), 1.0)
    log_all = math.log(math.e + 2)  # the same for all: one other is near, two are far
    expected = (log_all - 1) + (log_all - 1 / 2) + log_all
    np.testing.assert_allclose([total, count], [expected, 3], rtol=1e-6)


@pytest.mark.parametrize(
    'label_BS',
    [[[0]] * 4, [[-1]] * 4, [[0], [1], [2], [3]], [[0], [0], [-1], [1]]],
    ids=['one label', 'no label', 'no pair', 'some'],
)
@pytest.mark.parametrize('identical', [True, False])
@pytest.mark.parametrize('compared', [True, False])
def test_contrast_has_finite_gradients(label_BS, identical, compared):
    vector_BK = np.tile(unit_vectors(1, 3, 0), (4, 1)) if identical else unit_vectors(4, 3, 0)
    weight_BB = losses.label_overlap(np.array(label_BS))

    def total(vector_BK):
        return losses.supervised_contrastive(vector_BK, weight_BB, everyone(4) & compared, 0.07)[0]

    value, slope_BK = jax.value_and_grad(total)(vector_BK)
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope_BK))
    has_pair = compared and np.any(np.asarray(weight_BB) * (1 - np.eye(4)))
    assert (value > 0) == has_pair
