"""Losses over sampled negatives, against loops and the full softmax, and the sampling itself."""

import math
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import assert_all_close, make_loss_inputs, make_negatives, value_and_grads
from oracles import cross_entropy_loop
from scipy import stats

from fame_jax import losses
from fame_jax.models.item_model import unit

COUNTS = np.array([99, 5, 0, 12, 1, 0, 40])  # row 0 is the padding; then items 1 to 6


# Binary cross-entropy.


def binary_loop(query_TD, item_VD, target_T, negative_TR, weight_T, negative_weight_TR):
    """Binary cross-entropy, a pair at a time, in float64: sum, count and both gradients."""
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


def test_the_binary_loss_of_scores_of_zero_is_twice_log_2():
    zero, one = np.zeros((1, 2)), np.ones((1, 3))
    args = zero, np.ones((5, 2)), np.array([1]), np.array([[2, 3, 4]]), np.ones(1), one
    total, count, d_query, _ = value_and_grads(losses.binary_cross_entropy, *args)
    np.testing.assert_allclose([total, count], [2 * math.log(2), 1], rtol=1e-6)
    np.testing.assert_allclose(d_query, [[-1 / 2 + 1 / 2] * 2], atol=1e-7)


@pytest.mark.parametrize('negatives', [1, 4])
def test_the_binary_loss_equals_a_loop_in_float64(negatives):
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(20, 9)
    negative_TR, valid_TR = make_negatives(20, 9, negatives)
    assert (valid_TR.sum(axis=1) == 0).any()  # some tokens have no valid negative
    args = target_T, negative_TR, weight_T, valid_TR
    expected = binary_loop(query_TD, item_VD, *args)
    item_VD[0] = np.nan
    assert_all_close(
        value_and_grads(losses.binary_cross_entropy, query_TD, item_VD, *args), expected
    )


def test_the_binary_loss_of_scores_of_ten_thousand():
    item_VD = np.array([[0.0], [-100.0], [100.0]])
    args = np.array([[100.0]]), item_VD, np.array([1]), np.array([[2]]), np.ones(1), np.ones((1, 1))
    total, _, d_query, d_item = value_and_grads(losses.binary_cross_entropy, *args)
    np.testing.assert_allclose(total, 1e4 + 1e4)
    np.testing.assert_allclose(d_query, [[100 + 100]])
    np.testing.assert_allclose(d_item, [[0], [-100], [100]])


# Sampled cross-entropy.


def test_with_all_items_as_negatives_it_is_the_full_softmax():
    data = make_loss_inputs(12, 10)
    query_TD, item_VD, target_T, weight_T = data
    shared_R = np.arange(1, 11)
    for negative in (shared_R, np.tile(shared_R, (12, 1))):
        result = value_and_grads(
            losses.sampled_cross_entropy, query_TD, item_VD, target_T, negative, weight_T
        )
        assert_all_close(result, cross_entropy_loop(*data))


def test_a_sampled_loss_by_hand():
    # Scores 0, log 2, log 3; the target is item 1 and is also drawn, which has no effect.
    item_VD = np.array([[np.nan], [0.0], [math.log(2)], [math.log(3)]])
    args = np.ones((1, 1)), item_VD, np.array([1]), np.array([2, 3, 1]), np.ones(1)
    sampled = losses.sampled_cross_entropy
    np.testing.assert_allclose(sampled(*args), [math.log(1 + 2 + 3), 1], rtol=1e-6)
    # Negatives of weight 0 are left out.
    weight_TR = np.array([[1.0, 0.0, 1.0]])
    np.testing.assert_allclose(sampled(*args, negative_weight_TR=weight_TR)[0], math.log(1 + 2))
    # Three draws, each divided by 3 times its probability; the target is not.
    log_q_R = np.log([1 / 2, 1 / 4, 1 / 4])
    expected = math.log(1 + 2 / (3 / 2) + 3 / (3 / 4))
    np.testing.assert_allclose(sampled(*args, log_q=log_q_R)[0], expected, rtol=1e-6)
    own = args[:3], np.array([[2, 3, 1]]), args[4]
    total, _ = sampled(*own[0], *own[1:], log_q=log_q_R[None])
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_a_sample_of_the_target_alone_has_loss_zero():
    query_TD, item_VD, _, _ = make_loss_inputs(3, 5)
    args = query_TD, item_VD, np.full(3, 2), np.full(4, 2), np.ones(3)
    total, _, d_query, d_item = value_and_grads(losses.sampled_cross_entropy, *args)
    for result in (total, d_query, d_item):
        np.testing.assert_allclose(result, np.zeros(result.shape), atol=1e-6)


def test_row_0_is_never_read():
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(20, 9)
    negative_TR, valid_TR = make_negatives(20, 9, 4)
    sampled = partial(losses.sampled_cross_entropy, negative_weight_TR=valid_TR)
    args = target_T, negative_TR, weight_T
    expected = value_and_grads(sampled, query_TD, item_VD, *args)
    item_VD[0] = np.nan
    assert_all_close(value_and_grads(sampled, query_TD, item_VD, *args), expected)
    # Four draws of nine equally likely items: each has the factor 9 / 4.
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


def test_bfloat16_products_are_summed_in_float32():
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(12, 10, 32)
    query_TD, item_VD = query_TD.astype(jnp.bfloat16), item_VD.astype(jnp.bfloat16)
    exact = query_TD.astype(np.float32), item_VD.astype(np.float32)
    shared = target_T, np.arange(1, 11), weight_T
    own = target_T, np.tile(np.arange(1, 11), (12, 1)), weight_T, np.ones((12, 10), np.float32)
    for loss, args in [
        (losses.sampled_cross_entropy, shared),
        (losses.sampled_cross_entropy, own[:3]),
        (losses.binary_cross_entropy, own),
    ]:
        total, count, *grads = value_and_grads(loss, query_TD, item_VD, *args)
        assert_all_close([total, count], loss(*map(jnp.asarray, (*exact, *args))))
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


def test_each_key_draws_other_negatives(key):
    cumulative_V = losses.cumulative_counts(np.full(10_001, 3))
    uniform, popular = set(), set()
    for other in jax.random.split(key, 5):
        uniform |= set(np.ravel(losses.draw_negatives(other, (4,), 10_000)).tolist())
        popular |= set(np.ravel(losses.draw_popular(other, (4,), cumulative_V)[0]).tolist())
    assert min(len(uniform), len(popular)) > 4 * 5 - 3


# Negatives by popularity.


def test_cumulative_counts_add_one_to_each_item():
    cumulative_V = losses.cumulative_counts(COUNTS)
    assert cumulative_V.tolist() == [0, 6, 7, 20, 22, 23, 64]
    assert cumulative_V.dtype == np.int32
    with pytest.raises(ValueError, match='too many'):
        losses.cumulative_counts(np.array([0, 2**31 - 1]))


def test_draws_by_popularity_follow_the_counts(key):
    draw = jax.jit(partial(losses.draw_popular, shape=(100, 640)))
    ids, log_q = draw(key, cumulative_V=losses.cumulative_counts(COUNTS))
    assert ids.shape == log_q.shape == (100, 640)
    assert ids.dtype == jnp.int32
    drawn = Counter(np.ravel(ids).tolist())
    assert set(drawn) == {1, 2, 3, 4, 5, 6}
    found = [drawn[v] for v in range(1, 7)]
    assert stats.chisquare(found, (COUNTS[1:] + 1) * 1000).pvalue > 0.01
    assert stats.chisquare(found, 64_000 / 6).pvalue < 1e-6  # the test tells it from a uniform draw
    expected = np.log((COUNTS + 1) / 64)[np.asarray(ids)]
    np.testing.assert_allclose(log_q, expected, rtol=1e-5)
    again, _ = draw(key, cumulative_V=losses.cumulative_counts(COUNTS))
    np.testing.assert_array_equal(again, ids)


def test_a_catalogue_of_one_item(key):
    ids, log_q = losses.draw_popular(
        key, (5,), jnp.asarray(losses.cumulative_counts(np.array([0, 3])))
    )
    assert ids.tolist() == [1] * 5
    assert log_q.tolist() == [0] * 5


def estimates(draws, rounds=50):
    """The sampled loss by popularity, for many samples of so many draws."""
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(5, 6, seed=3)
    data = [jnp.asarray(x) for x in (query_TD, item_VD, np.maximum(target_T, 1), weight_T)]
    cumulative_V = jnp.asarray(losses.cumulative_counts(COUNTS))

    def one(key):
        negative_R, log_q_R = losses.draw_popular(key, (draws,), cumulative_V)
        total, _ = losses.sampled_cross_entropy(
            data[0], data[1], data[2], negative_R, data[3], log_q=log_q_R
        )
        return total

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), rounds))), data


def test_many_draws_by_popularity_estimate_the_full_softmax():
    """The sum inside the logarithm is unbiased, so the mean loss is too small (Jensen)."""
    total, data = estimates(20_000)
    expected, *_ = cross_entropy_loop(*data)
    spread = total.std() / math.sqrt(len(total))
    assert abs(total.mean() - expected) < 4 * spread + 1e-3
    assert spread < 0.01
    few, _ = estimates(16, rounds=2000)
    assert few.mean() < expected


def test_each_item_drawn_once_is_the_full_softmax():
    """Six draws with probability 1 / 6 each have the correction log(6 / 6) = 0."""
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(5, 6, seed=3)
    target_T = np.maximum(target_T, 1)
    log_q_R = np.full(6, math.log(1 / 6), np.float32)
    total, count = losses.sampled_cross_entropy(
        query_TD, item_VD, target_T, np.arange(1, 7), weight_T, log_q=log_q_R
    )
    expected, *_ = cross_entropy_loop(query_TD, item_VD, target_T, weight_T)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(count, weight_T.sum())


@pytest.mark.parametrize('shared', [True, False])
def test_item_transform_is_applied_to_the_gathered_rows(shared):
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(20, 9)
    negative_TR, valid_TR = make_negatives(20, 9, 4)
    negative = np.arange(1, 6) if shared else negative_TR
    sampled = losses.sampled_cross_entropy
    transformed = partial(sampled, item_transform=unit)

    def expected(query_TD, item_VD, *args):
        return sampled(query_TD, unit(item_VD), *args)

    args = target_T, negative, weight_T
    assert_all_close(
        value_and_grads(transformed, query_TD, item_VD, *args),
        value_and_grads(expected, query_TD, item_VD, *args),
    )
    args = target_T, negative_TR, weight_T, valid_TR
    binary = losses.binary_cross_entropy

    def expected_binary(query_TD, item_VD, *args):
        return binary(query_TD, unit(item_VD), *args)

    assert_all_close(
        value_and_grads(partial(binary, item_transform=unit), query_TD, item_VD, *args),
        value_and_grads(expected_binary, query_TD, item_VD, *args),
    )


def test_memory_at_a_million_items_is_one_gradient():
    """The transform needs no second table; the only buffer of that size is the gradient."""

    def temporaries(items):
        shapes = [((512, 64), 'float32'), ((items + 1, 64), 'float32'), ((512,), 'int32')]
        shapes += [((256,), 'int32'), ((512,), 'float32')]
        loss = partial(losses.sampled_cross_entropy, item_transform=unit)
        f = jax.jit(jax.grad(lambda *args: loss(*args)[0], argnums=(0, 1)))
        compiled = f.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(1_000_000) < 4e6
