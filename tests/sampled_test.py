"""Negatives by popularity: how they are drawn, and that they estimate the full softmax."""

import math
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_test import assert_close, graded, make, make_negatives
from scipy import stats

from fame_jax import losses
from fame_jax.models.items import unit

COUNTS = np.array([99, 5, 0, 12, 1, 0, 40])  # of the padding, then of items 1 to 6


def test_what_is_drawn_by_is_the_counts_and_one():
    cumulative_V = losses.cumulate(COUNTS)
    assert cumulative_V.tolist() == [0, 6, 7, 20, 22, 23, 64]
    assert cumulative_V.dtype == np.int32
    with pytest.raises(ValueError, match='too many'):
        losses.cumulate(np.array([0, 2**31 - 1]))


def test_draws_match_the_counts(key):
    draw = jax.jit(partial(losses.draw_popular, shape=(100, 640)))
    ids, log_q = draw(key, cumulative_V=losses.cumulate(COUNTS))
    assert ids.shape == log_q.shape == (100, 640)
    assert ids.dtype == jnp.int32
    drawn = Counter(np.ravel(ids).tolist())
    assert set(drawn) == {1, 2, 3, 4, 5, 6}
    found = [drawn[v] for v in range(1, 7)]
    assert stats.chisquare(found, (COUNTS[1:] + 1) * 1000).pvalue > 0.01
    assert stats.chisquare(found, 64_000 / 6).pvalue < 1e-6  # and nothing else
    expected = np.log((COUNTS + 1) / 64)[np.asarray(ids)]
    np.testing.assert_allclose(log_q, expected, rtol=1e-5)
    again, _ = draw(key, cumulative_V=losses.cumulate(COUNTS))
    np.testing.assert_array_equal(again, ids)


def test_one_item_is_always_drawn(key):
    ids, log_q = losses.draw_popular(key, (5,), jnp.asarray(losses.cumulate(np.array([0, 3]))))
    assert ids.tolist() == [1] * 5
    assert log_q.tolist() == [0] * 5


def full_softmax(query_TD, item_VD, target_T, weight_T):
    """In float64, an item at a time."""
    scores = np.asarray(query_TD, np.float64) @ np.asarray(item_VD, np.float64).T
    lost = [
        weight * (math.log(sum(math.exp(s) for s in row[1:])) - row[target])
        for row, target, weight in zip(scores, target_T, weight_T)
    ]
    return sum(lost)


def estimates(draws, rounds=50):
    """The sampled loss of many draws, whose items are far from equally often drawn."""
    query_TD, item_VD, target_T, weight_T = make(5, 6, seed=3)
    data = [jnp.asarray(x) for x in (query_TD, item_VD, np.maximum(target_T, 1), weight_T)]
    cumulative_V = jnp.asarray(losses.cumulate(COUNTS))

    def one(key):
        negative_R, log_q_R = losses.draw_popular(key, (draws,), cumulative_V)
        total, _ = losses.sampled_cross_entropy(
            data[0], data[1], data[2], negative_R, data[3], log_q=log_q_R
        )
        return total

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), rounds))), data


def test_many_draws_estimate_the_full_softmax():
    """Importance weights are unbiased under the logarithm, so the loss comes from below."""
    total, data = estimates(20_000)
    expected = full_softmax(*data)
    spread = total.std() / math.sqrt(len(total))
    assert abs(total.mean() - expected) < 4 * spread + 1e-3
    assert spread < 0.01
    few, _ = estimates(16, rounds=2000)
    assert few.mean() < expected
    # Without the weights it is another loss, however many are drawn.
    assert abs(total.mean() - expected) < 0.01 * expected


def test_each_item_once_by_its_probability_is_the_full_softmax():
    """Six draws that are what six draws would be if probabilities were 1 / 6: weights of one."""
    query_TD, item_VD, target_T, weight_T = make(5, 6, seed=3)
    target_T = np.maximum(target_T, 1)
    log_q_R = np.full(6, math.log(1 / 6), np.float32)
    total, count = losses.sampled_cross_entropy(
        query_TD, item_VD, target_T, np.arange(1, 7), weight_T, log_q=log_q_R
    )
    expected = full_softmax(query_TD, item_VD, target_T, weight_T)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(count, weight_T.sum())


@pytest.mark.parametrize('shared', [True, False])
def test_raw_rows_are_made_vectors_after_they_are_gathered(shared):
    query_TD, item_VD, target_T, weight_T = make(20, 9)
    negative_TR, valid_TR = make_negatives(20, 9, 4)
    negative = np.arange(1, 6) if shared else negative_TR
    sampled = losses.sampled_cross_entropy
    found = partial(sampled, prepare=unit)

    def expected(query_TD, item_VD, *args):
        return sampled(query_TD, unit(item_VD), *args)

    args = target_T, negative, weight_T
    assert_close(
        graded(found, query_TD, item_VD, *args), graded(expected, query_TD, item_VD, *args)
    )
    args = target_T, negative_TR, weight_T, valid_TR
    binary = losses.binary_cross_entropy

    def expected_binary(query_TD, item_VD, *args):
        return binary(query_TD, unit(item_VD), *args)

    assert_close(
        graded(partial(binary, prepare=unit), query_TD, item_VD, *args),
        graded(expected_binary, query_TD, item_VD, *args),
    )


def test_memory_of_a_sample_is_one_gradient_at_a_million_items():
    """Rows alone are normalised: no second table beside the gradient, which is the output."""

    def temporaries(items):
        shapes = [((512, 64), 'float32'), ((items + 1, 64), 'float32'), ((512,), 'int32')]
        shapes += [((256,), 'int32'), ((512,), 'float32')]
        loss = partial(losses.sampled_cross_entropy, prepare=unit)
        f = jax.jit(jax.grad(lambda *args: loss(*args)[0], argnums=(0, 1)))
        compiled = f.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(1_000_000) < 4e6
