"""MiaSRec against explicit float64 loops; entmax against bisection; rows of any width."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import assert_close, compile_gradient, float64, make_model, new_key, quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import block_loop, comparable_loop, norm_loop, softmax_loop

from fame_jax.batch import Batch
from fame_jax.models import miasrec

HISTORIES = [[1, 2, 3, 2], [4], [5, 5, 5], [6, 7, 8, 9]]


def make_mia(**options):
    """A small model, some of whose queries are excluded."""
    module, params = make_model('miasrec', **{'highest_weight': 0.7, **options})
    return module, params | {'importance': 5 * params['importance']}


def fields_of(histories, length):
    """Rows that end with their history: tokens, positions and segments."""
    tokens_BL = np.zeros((len(histories), length), np.int32)
    positions_BL = np.zeros_like(tokens_BL)
    for b, items in enumerate(histories):
        tokens_BL[b, length - len(items) :] = items
        positions_BL[b, length - len(items) :] = range(len(items))
    return tokens_BL, positions_BL, (tokens_BL > 0).astype(np.int32)


def make_batch(histories, targets, length):
    """Rows of histories, with a target and a weight in the last column alone."""
    fields = fields_of(histories, length)
    target_BL, weight_BL = np.zeros_like(fields[0]), np.zeros(fields[0].shape, np.float32)
    target_BL[:, -1], weight_BL[:, -1] = targets, np.array(targets) > 0
    return Batch(*fields, target_BL, weight_BL)


@cache
def scorer(module):
    """(params, fields) -> queries, item vectors, scores of the catalogue, named intermediates."""

    def score(params, fields):
        query_BQD, out = module.apply({'params': params}, *fields)
        item_VD = module.apply({'params': params}, method='item_vectors')
        score_BV = module.combine(jnp.einsum('BQD,VD->BQV', query_BQD, item_VD))
        return query_BQD, item_VD, score_BV, out

    return quick_jit(score)


# The equations, a place and an item at a time.


def entmax_loop(scores, alpha):
    """By bisection on the threshold, for any alpha > 1."""
    scores = (alpha - 1) * (np.asarray(scores, np.float64) - max(scores))

    def powers(tau):
        return np.array([max(score - tau, 0.0) ** (1 / (alpha - 1)) for score in scores])

    low, high = -1.0, 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(powers(middle)) >= 1 else (low, middle)
    return powers(low) / sum(powers(low))


def transformer_loop(x_QD, p, module):
    """Each position in turn is moved to the row's end: without distances order does not matter."""
    for n in range(module.num_blocks):
        block, ones_Q, actual = p[f'block_{n}'], np.ones(len(x_QD), int), []
        for i in range(len(x_QD)):
            order = [j for j in range(len(x_QD)) if j != i] + [i]
            actual.append(block_loop(x_QD[order], ones_Q, block, module.attention_scale)[0][-1])
        x_QD = np.array(actual)
    return x_QD


def history_loop(items, p, module):
    """Unit vectors u of the mean and of each item, the last first, and their gamma."""
    vectors = [p['item_table'][item] for item in items[::-1]]
    x_QD = np.array([sum(vectors) / len(vectors), *vectors])
    counts = [1] + [min(items.count(item), 2) for item in items[::-1]]
    read_QD = [
        norm_loop(x_D + p['position_table'][i] + p['count_table'][count - 1], p['input_norm'])
        for i, (x_D, count) in enumerate(zip(x_QD, counts))
    ]
    o_QD = transformer_loop(np.array(read_QD), p, module)
    for i, (x_D, o_D) in enumerate(zip(x_QD, o_QD)):
        gate_D = np.concatenate([x_D, o_D]) @ p['gate']['kernel'] + p['gate']['bias']
        gate_D = 1 / (1 + np.exp(-gate_D))
        o_QD[i] = gate_D * x_D + (1 - gate_D) * o_D
    importance_Q = [float(o_D @ p['importance']) for o_D in o_QD]
    if module.entmax_alpha == 1:
        gamma_Q = softmax_loop(importance_Q)
    else:
        gamma_Q = entmax_loop(importance_Q, module.entmax_alpha)
    return [comparable_loop(o_D, module.similarity) for o_D in o_QD], gamma_Q


def scores_loop(items, p, module):
    """Scores of the catalogue, row 0 included, by the sum that the paper writes."""
    u_QD, gamma_Q = history_loop(items, p, module)
    actual = []
    for x_D in p['item_table']:
        e_D = comparable_loop(x_D, module.similarity)
        each = [float(u_D @ e_D) for u_D, gamma in zip(u_QD, gamma_Q) if gamma > 1e-9]
        mean = sum(each) / len(each)
        score = module.highest_weight * max(each) + (1 - module.highest_weight) * mean
        actual.append(score if module.similarity == 'dot' else score / module.temperature)
    return np.array(actual), gamma_Q


CASES = [
    (4, {}),
    (5, {'entmax_alpha': 2, 'num_blocks': 2, 'attention_scale': 'model'}),
    (6, {'entmax_alpha': 1, 'highest_weight': 1.0, 'num_heads': 4, 'attention_bias': False}),
    (4, {'similarity': 'dot', 'highest_weight': 0.0}),
]


@pytest.mark.parametrize('length, options', CASES)
def test_matches_the_loop(length, options):
    module, params = make_mia(**options)
    _, _, score_BV, out = scorer(module)(params, fields_of(HISTORIES, length))
    p = float64(params)
    for items, score_V, gamma_Q in zip(HISTORIES, score_BV, out['gamma_BQ'], strict=True):
        expected_V, expected_Q = scores_loop(items, p, module)
        assert_close(score_V, expected_V, 3e-5)
        assert_close(gamma_Q, np.pad(expected_Q, (0, length - len(items))), 3e-5)


def test_excluded_queries_repeat_the_most_important_one():
    module, params = make_mia()
    query_BQD, _, _, out = scorer(module)(params, fields_of(HISTORIES, 5))
    excluded = 0
    for items, query_QD, gamma_Q in zip(HISTORIES, query_BQD, out['gamma_BQ'], strict=True):
        real_Q = np.arange(6) <= len(items)
        excluded += (gamma_Q[real_Q] == 0).sum()
        for i in np.flatnonzero(gamma_Q == 0):
            np.testing.assert_array_equal(query_QD[i], query_QD[gamma_Q.argmax()])
        assert len(np.unique(query_QD, axis=0)) == (gamma_Q > 0).sum()
    assert excluded


def test_equal_importance_excludes_no_query():
    module, params = make_mia()
    params = params | {'importance': params['importance'] * 0}
    gamma_BQ = scorer(module)(params, fields_of(HISTORIES, 4))[-1]['gamma_BQ']
    for items, gamma_Q in zip(HISTORIES, gamma_BQ):
        expected_Q = [1 / (len(items) + 1)] * (len(items) + 1) + [0] * (4 - len(items))
        assert_close(gamma_Q, expected_Q)


@pytest.mark.slow
def test_a_history_means_the_same_in_a_row_of_any_length_and_beside_any_other():
    module, params = make_mia()
    *_, score_BV, _ = scorer(module)(params, fields_of(HISTORIES, 4))
    for length in (6, 5):
        *_, other_BV, _ = scorer(module)(params, fields_of(HISTORIES[::-1], length))
        assert_close(other_BV[::-1], score_BV)


def test_the_count_of_a_repeated_item_changes_scores():
    module, params = make_mia()
    fields = fields_of([[2, 3, 2], [2, 3, 4], [2, 2, 2]], 3)
    *_, score_BV, _ = scorer(module)(params, fields)
    once_C = params['count_table'][:1]
    same = params | {'count_table': jnp.concatenate([once_C, once_C])}
    *_, other_BV, _ = scorer(module)(same, fields)
    changed_B = np.abs(other_BV - score_BV).max(axis=1) > 1e-3
    assert changed_B.tolist() == [True, False, True]


def test_a_slice_of_the_catalogue_has_the_scores_of_the_whole():
    module, params = make_mia()
    query_BQD, item_VD, score_BV, _ = scorer(module)(params, fields_of(HISTORIES, 4))
    for part in (slice(1, 4), slice(4, 13), [7, 2]):
        score = module.combine(np.einsum('BQD,VD->BQV', query_BQD, item_VD[part]))
        assert_close(score, score_BV[:, part])


# The loss.


@cache
def loss_and_gradient(module):
    return compile_gradient(module, chunk_tokens=10)  # two rows at a time


def test_the_loss_is_the_cross_entropy_of_the_scores():
    module, params = make_mia()
    targets = [5, 6, 0, 12]  # the third row does not count
    expected = 0.0
    for items, target in zip(HISTORIES, targets):
        score_V, _ = scores_loop(items, float64(params), module)
        if target:
            expected -= np.log(softmax_loop(score_V[1:])[target - 1])
    batch = make_batch(HISTORIES, targets, 4)
    (total, count), gradient = loss_and_gradient(module)(params, batch, new_key(0))
    assert_close([total, count], [expected, 3])
    assert not gradient['item_table'][0].any()
    idle = {name for name, leaf in gradient.items() if not any(map(np.any, jax.tree.leaves(leaf)))}
    assert idle == {'importance'}  # gamma is a mask, as in the authors' code


@pytest.mark.slow
def test_rows_of_padding_change_neither_loss_nor_gradient():
    module, params = make_mia()
    f = loss_and_gradient(module)
    (total, count), gradient = f(params, make_batch(HISTORIES, [5, 6, 7, 12], 4), new_key(0))
    filled = make_batch([*HISTORIES, []], [5, 6, 7, 12, 0], 6)
    (other, other_count), other_gradient = f(params, filled, new_key(0))
    assert_close([other, other_count], [total, count])
    jax.tree.map(partial(assert_close, bound=3e-5), other_gradient, gradient)


def test_the_gradient_of_the_highest_goes_to_one():
    score_BQV = np.array([[[1, 5, 2], [3, 4, 2]], [[0, 0, 0], [-1, 0, 1]]], np.float32)
    slope_BV = np.array([[10, 20, 30], [40, 50, 60]], np.float32)

    def total(score_BQV):
        highest_BV = miasrec.highest_score(score_BQV)
        return (slope_BV * highest_BV).sum(), highest_BV

    slope_BQV, highest_BV = quick_jit(jax.grad(total, has_aux=True))(score_BQV)
    assert highest_BV.tolist() == [[3, 5, 2], [0, 0, 1]]
    expected = [[[0, 20, 30], [10, 0, 0]], [[40, 50, 0], [0, 0, 60]]]
    np.testing.assert_array_equal(slope_BQV, expected)


def test_dropout_falls_on_items_and_candidates_in_training_alone():
    module, params = make_mia(dropout=0.5, item_dropout=0.5)
    fields = fields_of(HISTORIES, 4)

    @partial(quick_jit, static_argnums=0)
    def both(train, seed):
        rngs = {'dropout': new_key(seed)}
        f = partial(module.apply, method='forward', train=train, rngs=rngs)
        return f({'params': params}, *fields)[:2]

    for one, other in zip(both(True, 0), both(True, 1)):
        assert (one != other).any()
    (query, _), (again, _) = both(False, 0), both(False, 1)
    np.testing.assert_array_equal(query, again)
    dropped_VD = both(True, 0)[1]
    assert 0.3 < (dropped_VD == 0).mean() < 0.7
    # Of unit length after the drop.
    lengths_V = np.linalg.norm(dropped_VD, axis=1)
    assert_close(lengths_V[lengths_V > 0], np.ones((lengths_V > 0).sum()))


@pytest.mark.slow
def test_bfloat16_is_finite_and_near():
    module, params = make_mia(entmax_alpha=1)  # a mask may change with a rounding
    batch = make_batch(HISTORIES, [5, 6, 7, 12], 4)
    (expected, _), _ = loss_and_gradient(module)(params, batch, new_key(0))
    low = module.clone(dtype=jnp.bfloat16)
    (total, _), gradient = loss_and_gradient(low)(params, batch, new_key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose(total, expected, rtol=0.05)
    assert scorer(low)(params, batch[:3])[0].dtype == jnp.bfloat16


# Entmax.


@cache
def entmax_of(alpha):
    return quick_jit(partial(miasrec.entmax, alpha=alpha))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    alpha=st.sampled_from([1.0, 1.5, 2.0]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 10.0, 1e4]),
    real=st.lists(st.booleans(), min_size=7, max_size=7).filter(any),
    seed=st.integers(0, 999),
)
def test_entmax_against_bisection(alpha, scale, real, seed):
    score_Q = (scale * np.random.default_rng(seed).normal(size=7)).astype(np.float32)
    score_Q[3] = score_Q[5]  # A tie.
    p_Q = entmax_of(alpha)(score_Q[None], np.array([real]))[0]
    expected_Q = np.zeros(7)
    of_real = score_Q[real].astype(np.float64)
    expected_Q[real] = softmax_loop(of_real) if alpha == 1 else entmax_loop(of_real, alpha)
    assert_close(p_Q, expected_Q, 1e-5 if scale < 1e4 else 1e-3)
    assert not p_Q[~np.array(real)].any()
    assert abs(p_Q.sum() - 1) < 1e-5


def test_entmax_by_hand():
    real_BQ = np.ones((1, 3), bool)
    # Sparsemax of 0.6, 0.2, -1: tau = (0.8 - 1) / 2.
    sparse_Q = entmax_of(2.0)(np.array([[0.6, 0.2, -1.0]], np.float32), real_BQ)[0]
    assert_close(sparse_Q, [0.7, 0.3, 0])
    # 1.5: with the roots .8 and .6 of .64 and .36 the scores are twice as far apart as these.
    half_Q = entmax_of(1.5)(np.array([[1.6, 1.2, 0.0]], np.float32), real_BQ)[0]
    assert_close(half_Q, [0.64, 0.36, 0])


def test_another_alpha_is_refused():
    with pytest.raises(ValueError, match=r'entmax_alpha=1\.3 has to be 1 '):
        miasrec.entmax(jnp.zeros((1, 2)), jnp.ones((1, 2), bool), 1.3)
