"""Cross-entropy with several queries per token, against explicit float64 loops."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import assert_all_close, make_loss_inputs, value_and_grads
from oracles import cross_entropy_loop

from fame_jax import losses


def highest(score_TQV):
    return score_TQV.max(axis=1)


def mixture(score_TQV):
    """Combines the scores so that every query has a gradient."""
    return jax.nn.logsumexp(score_TQV, axis=1)


@cache
def multi_query(combine, chunk_tokens):
    return partial(losses.multi_query_cross_entropy, combine=combine, chunk_tokens=chunk_tokens)


def make_inputs(tokens, queries, items, **options):
    """As `make_loss_inputs`, with several queries per token."""
    query_SD, item_VD, target_S, weight_S = make_loss_inputs(tokens * queries, items, **options)
    query_TQD = query_SD.reshape(tokens, queries, -1)
    return query_TQD, item_VD, target_S[::queries], weight_S[::queries]


def highest_loop(query_TQD, item_VD, target_T, weight_T):
    """Each item scored by its best query, an item at a time, in float64."""
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
def test_the_highest_query_equals_a_loop_in_float64(chunk_tokens):
    # Seven tokens of three queries; tokens per chunk: all, one, two (the last chunk overlaps), two,
    # all.
    data = make_inputs(7, 3, 10)
    assert_all_close(
        value_and_grads(multi_query(highest, chunk_tokens), *data), highest_loop(*data)
    )


def test_one_query_per_token_is_cross_entropy():
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(7, 10)
    expected = cross_entropy_loop(query_TD, item_VD, target_T, weight_T)
    total, count, d_query, d_item = value_and_grads(
        multi_query(highest, 2), query_TD[:, None], item_VD, target_T, weight_T
    )
    assert_all_close((total, count, d_query[:, 0], d_item), expected)


def test_any_combine_function_is_differentiated():
    data = make_inputs(7, 3, 10)

    def naive(query_TQD, item_VD, target_T, weight_T):
        score_TV = mixture(jnp.einsum('TQD,VD->TQV', query_TQD, item_VD[1:]))
        logp_TV = jax.nn.log_softmax(score_TV)
        return -(logp_TV[jnp.arange(7), target_T - 1] * weight_T).sum(), weight_T.sum()

    assert_all_close(value_and_grads(multi_query(mixture, 4), *data), value_and_grads(naive, *data))


def test_a_repeated_query_shares_its_gradient_with_the_copy():
    query_TQD, item_VD, target_T, weight_T = make_inputs(7, 3, 10)
    total, count, d_query, d_item = highest_loop(query_TQD, item_VD, target_T, weight_T)
    repeated_TQD = np.concatenate([query_TQD, query_TQD[:, :1]], axis=1)
    result = value_and_grads(multi_query(highest, 8), repeated_TQD, item_VD, target_T, weight_T)
    assert_all_close((*result[:2], result[3]), (total, count, d_item))
    assert_all_close(
        [result[2][:, 0] + result[2][:, 3], result[2][:, 1:3]], [d_query[:, 0], d_query[:, 1:]]
    )


@pytest.mark.parametrize('junk', [1e30, np.inf, np.nan])
def test_row_0_is_never_read(junk):
    query_TQD, item_VD, target_T, weight_T = make_inputs(7, 3, 10)
    assert (target_T == 0).any()
    expected = highest_loop(query_TQD, item_VD, target_T, weight_T)
    item_VD[0] = junk
    result = value_and_grads(multi_query(highest, 6), query_TQD, item_VD, target_T, weight_T)
    assert_all_close(result, expected)
    assert not np.any(result[3][0])


def test_bfloat16_products_are_summed_in_float32():
    query_TQD, item_VD, target_T, weight_T = make_inputs(20, 3, 30, width=32)
    query_TQD, item_VD = query_TQD.astype(jnp.bfloat16), item_VD.astype(jnp.bfloat16)
    result = value_and_grads(multi_query(highest, 9), query_TQD, item_VD, target_T, weight_T)
    expected = highest_loop(query_TQD, item_VD, target_T, weight_T)
    assert result[0].dtype == jnp.float32
    assert result[2].dtype == result[3].dtype == jnp.bfloat16
    assert_all_close(result[:2], expected[:2])
    assert_all_close(result[2:], expected[2:], bound=3 * 2**-9)


def test_memory_grows_with_the_chunk_and_not_with_the_tokens():
    def temporaries_of(tokens):
        shapes = [((tokens, 9, 64), 'float32'), ((5001, 64), 'float32')]
        shapes += [((tokens,), 'int32'), ((tokens,), 'float32')]
        f = jax.jit(jax.grad(lambda *args: multi_query(highest, 72)(*args)[0], argnums=(0, 1)))
        compiled = f.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Only the queries' gradients grow with the tokens: formed with the value, and scaled later.
    assert temporaries_of(512) - temporaries_of(64) < 2 * 4 * (512 - 64) * 9 * 64


def test_a_negative_chunk_size_is_refused():
    with pytest.raises(ValueError, match='chunk_tokens must be >= 0'):
        multi_query(highest, -1)(*make_inputs(4, 2, 5))
