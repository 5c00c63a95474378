"""The objective: every loss over one packed batch, its negatives, its count, its key."""

import math
from functools import partial

import jax
import numpy as np
import pytest
from layers_test import assert_close, float64, new_key, quick_jit
from sasrec_test import PACKED, encode, make_batch, make_model

from fame_jax import losses
from fame_jax.models import objective

OPTIONS = {'loss': 'ce', 'num_negatives': 1, 'chunk_tokens': 0, 'chunk_items': 0}
BATCH = make_batch(PACKED)


def graded(module, **options):
    """(params, batch, key) -> ((sum, count), gradient)."""
    f = partial(objective.next_item, module, **OPTIONS | options)
    return quick_jit(jax.value_and_grad(f, has_aux=True))


def summed(module, **options):
    """(params, batch, key) -> (sum, count)."""
    return quick_jit(partial(objective.next_item, module, **OPTIONS | options))


def scores(module, params):
    """Every item's score at every position of the batch, float64 [L, V + 1]."""
    query_BLD, item_VD = encode(module, params, *BATCH[:3], method='query_and_items')
    return float64(query_BLD)[0] @ float64(item_VD).T


@pytest.fixture(scope='module')
def model():
    return make_model('sasrec', temperature=0.5)


@pytest.fixture(scope='module')
def by_cross_entropy(model):
    module, params = model
    return graded(module)(params, BATCH, new_key(0))


def test_cross_entropy_sums_over_the_positions_with_a_weight(model, by_cross_entropy):
    score_LV = scores(*model)
    expected = 0.0
    for i, target in enumerate(BATCH.targets_BL[0]):
        if target:
            total = sum(math.exp(score) for score in score_LV[i, 1:])
            expected += math.log(total) - score_LV[i, target]
    (total, number), _ = by_cross_entropy
    assert_close(total, expected)
    assert number == 7


def test_weights_count_what_they_weigh(model, by_cross_entropy):
    module, params = model
    half = BATCH._replace(weights_BL=BATCH.weights_BL / 2)
    total, number = summed(module)(params, half, new_key(0))
    assert number == 3.5
    assert_close(total, by_cross_entropy[0][0] / 2)


@pytest.mark.parametrize('chunk_tokens, chunk_items', [(5, 0), (0, 5), (7, 5)])
def test_chunks_change_nothing(model, by_cross_entropy, chunk_tokens, chunk_items):
    module, params = model
    f = graded(module, chunk_tokens=chunk_tokens, chunk_items=chunk_items)
    actual = f(params, BATCH, new_key(0))
    jax.tree.map(assert_close, actual, by_cross_entropy)


def test_binary_cross_entropy_takes_negatives_from_outside_the_history():
    """A history of all items but the seventh, which is then the only negative."""
    module, params = make_model('sasrec', temperature=0.5)
    fields = {
        'tokens': [[1, 2, 3, 4, 5, 6, 8, 9, 10, 11]],
        'positions': [list(range(10))],
        'segments': [[1] * 10],
        'targets': [[2, 3, 4, 5, 6, 8, 9, 10, 11, 12]],
    }
    batch = make_batch(fields)
    query_BLD, item_VD = encode(module, params, *batch[:3], method='query_and_items')
    score_LV = float64(query_BLD)[0] @ float64(item_VD).T
    expected = 0.0
    for i, target in enumerate(fields['targets'][0]):
        expected += math.log(1 + math.exp(-score_LV[i, target]))
        expected += math.log(1 + math.exp(score_LV[i, 7]))
    f = summed(module, loss='bce', num_negatives=200)
    total, number = f(params, batch, new_key(0))
    assert_close(total, expected)
    assert number == 10


def test_sampled_softmax_is_over_the_target_and_what_was_drawn():
    """Of two items; a softmax has its target once and the other item as often as it was drawn."""
    module, params = make_model('sasrec', temperature=0.5)
    params['item_table'] = params['item_table'][:3]
    module = module.clone(num_items=2)
    batch = make_batch(
        {'tokens': [[1, 2]], 'positions': [[0, 1]], 'segments': [[1, 1]], 'targets': [[2, 1]]}
    )
    query_BLD, item_VD = encode(module, params, *batch[:3], method='query_and_items')
    score_LV = float64(query_BLD)[0] @ float64(item_VD).T
    total, number = summed(module, loss='sampled', num_negatives=9)(params, batch, new_key(0))
    margins = score_LV[0, 1] - score_LV[0, 2], score_LV[1, 2] - score_LV[1, 1]
    possible = [
        math.log(1 + ones * math.exp(margins[0])) + math.log(1 + (9 - ones) * math.exp(margins[1]))
        for ones in range(10)
    ]
    assert min(abs(total - value) for value in possible) < 1e-5
    assert number == 2


@pytest.mark.parametrize(
    'loss, dropout, drawn',
    [('ce', 0, False), ('ce', 0.3, True), ('bce', 0, True), ('sampled', 0, True)],
)
def test_finite_and_drawn_from_the_key(loss, dropout, drawn):
    module, params = make_model('sasrec', dropout=dropout)
    f = graded(module, loss=loss, num_negatives=4)
    one, same, other = (f(params, BATCH, new_key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert bool(one[0][0] != other[0][0]) == drawn
    assert one[0][1] == other[0][1] == 7
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))
    assert one[0][0].dtype == one[0][1].dtype == np.float32


def test_a_batch_without_weights_is_zero_and_has_no_gradient(model):
    module, params = model
    empty = BATCH._replace(weights_BL=0 * BATCH.weights_BL)
    (total, number), gradient = graded(module)(params, empty, new_key(0))
    assert total == number == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_in_history_of_a_packed_row():
    """The row of the batch's own docstring: 7 8 9 and 4 5, and a place of padding."""
    batch = make_batch(
        {
            'tokens': [[7, 8, 4, 0], [5, 0, 0, 0]],
            'positions': [[0, 1, 0, 0], [0, 0, 0, 0]],
            'segments': [[1, 1, 2, 0], [1, 0, 0, 0]],
            'targets': [[8, 9, 5, 0], [6, 0, 0, 0]],
        }
    )
    item_BLR = np.broadcast_to(np.array([4, 5, 6, 7, 8, 9]), (2, 4, 6))
    found_BLR = np.asarray(objective.in_history(batch, item_BLR), int)
    assert found_BLR[0, :3].tolist() == [
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [1, 1, 0, 0, 0, 0],
    ]
    assert found_BLR[1, 0].tolist() == [0, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    'options',
    [{'tied_items': False}, {'item_training': 'frozen'}, {'item_training': 'added'}],
    ids=['untied', 'frozen', 'added'],
)
def test_raw_rows_of_every_table_give_what_item_vectors_give(options):
    module, params = make_model('sasrec', temperature=0.5, **options)
    assert module.has_plain_items()
    expected = graded(module)(params, BATCH, new_key(0))
    actual = graded(module, chunk_items=5)(params, BATCH, new_key(0))
    jax.tree.map(assert_close, actual, expected)


def test_models_with_item_vectors_of_their_own_keep_them():
    plain = {name: make_model(name)[0].has_plain_items() for name in ('sasrec', 'fame', 'gru4rec')}
    assert all(plain.values()), plain
    for name in ('core', 'atten_mixer'):
        assert not make_model(name)[0].has_plain_items()
    module, params = make_model('core')
    chunked = summed(module, chunk_items=5)(params, BATCH, new_key(0))
    jax.tree.map(assert_close, chunked, summed(module)(params, BATCH, new_key(0)))


def test_negatives_by_popularity_count_by_their_probability():
    """Of two items, one is drawn nine times in ten; a softmax has its target once."""
    module, params = make_model('sasrec', temperature=0.5)
    params['item_table'] = params['item_table'][:3]
    module = module.clone(num_items=2)
    batch = make_batch(
        {'tokens': [[1, 2]], 'positions': [[0, 1]], 'segments': [[1, 1]], 'targets': [[2, 1]]}
    )
    query_BLD, item_VD = encode(module, params, *batch[:3], method='query_and_items')
    score_LV = float64(query_BLD)[0] @ float64(item_VD).T
    popularity_V = losses.cumulate(np.array([0, 89, 9]))
    f = summed(
        module, loss='sampled', num_negatives=9, negatives='popularity', popularity_V=popularity_V
    )
    total, number = f(params, batch, new_key(0))
    margins = score_LV[0, 1] - score_LV[0, 2], score_LV[1, 2] - score_LV[1, 1]
    possible = [
        math.log(1 + ones / 9 / 0.9 * math.exp(margins[0]))
        + math.log(1 + (9 - ones) / 9 / 0.1 * math.exp(margins[1]))
        for ones in range(10)
    ]
    assert min(abs(total - value) for value in possible) < 1e-5
    assert number == 2
