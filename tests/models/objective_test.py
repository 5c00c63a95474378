"""The loss over items: every kind over one packed batch, its negatives, weights and key."""

import math

import jax
import numpy as np
import pytest
from fixtures import (
    BATCH,
    assert_close,
    compile_gradient,
    compile_objective,
    encode,
    float64,
    make_batch,
    make_model,
    new_key,
)

from fame_jax import losses
from fame_jax.losses import LossOptions
from fame_jax.models import objective


def scores(module, params):
    """Every item's score at every position of the batch, float64 [L, V + 1]."""
    query_BLD, item_VD, _ = encode(module, params, *BATCH[:3], method='forward')
    return float64(query_BLD)[0] @ float64(item_VD).T


@pytest.fixture(scope='module')
def model():
    return make_model('sasrec', temperature=0.5)


@pytest.fixture(scope='module')
def by_cross_entropy(model):
    module, params = model
    return compile_gradient(module)(params, BATCH, new_key(0))


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
    total, number, _ = compile_objective(module)(params, half, new_key(0))
    assert number == 3.5
    assert_close(total, by_cross_entropy[0][0] / 2)


@pytest.mark.parametrize('chunk_tokens, chunk_items', [(5, 0), (7, 5)])
def test_chunks_change_nothing(model, by_cross_entropy, chunk_tokens, chunk_items):
    module, params = model
    f = compile_gradient(module, chunk_tokens=chunk_tokens, chunk_items=chunk_items)
    actual = f(params, BATCH, new_key(0))
    jax.tree.map(assert_close, actual, by_cross_entropy)


SHARES = (1.0, 0.5, 0.25)


def soft_labels():
    """The label of each position of the batch: a share of each of the next items of its history."""
    target_L, segment_L = BATCH.targets_BL[0], BATCH.segments_BL[0]
    labels = []
    for i, target in enumerate(target_L):
        label = {}
        for j, share in enumerate(SHARES):
            inside = i + j < len(target_L) and segment_L[i + j] == segment_L[i]
            if target and inside and target_L[i + j]:
                label[target_L[i + j]] = label.get(target_L[i + j], 0) + share
        total = sum(label.values())
        labels.append({item: share / total for item, share in label.items()})
    return labels


def test_soft_labels_and_seen_items_of_a_packed_batch(model):
    """Against a loop over positions, in which a seen item's exp counts three times."""
    module, params = model
    score_LV = scores(*model)
    token_L, segment_L = BATCH.tokens_BL[0], BATCH.segments_BL[0]
    expected = 0.0
    for i, label in enumerate(soft_labels()):
        if not label:
            continue
        seen = {t for t, s in zip(token_L[: i + 1], segment_L[: i + 1]) if s == segment_L[i]}
        seen -= {BATCH.targets_BL[0][i]}
        terms = [(3 if v in seen else 1) * math.exp(score_LV[i, v]) for v in range(1, 13)]
        picked = sum(share * score_LV[i, item] for item, share in label.items())
        expected += math.log(sum(terms)) - picked
    options = {'future_targets': SHARES, 'seen_weight': 3.0}
    for chunks in ({}, {'chunk_tokens': 3}, {'chunk_tokens': 5, 'chunk_items': 4}):
        total, number, _ = compile_objective(module, **options, **chunks)(params, BATCH, new_key(0))
        assert_close(total, expected)
        assert number == 7


@pytest.mark.parametrize('loss', ['bce', 'sampled'])
def test_soft_labels_of_the_other_losses(model, loss):
    """Another label moves the loss by the difference of the targets' scores, or of their logs."""
    module, params = model
    score_LV = scores(*model)
    plain, soft = (
        compile_objective(module, loss=loss, num_negatives=4, future_targets=shares)(
            params, BATCH, new_key(0)
        )
        for shares in ((1.0,), SHARES)
    )
    value = (lambda s: -math.log1p(math.exp(-s))) if loss == 'bce' else (lambda s: s)
    moved = sum(
        value(score_LV[i, BATCH.targets_BL[0][i]])
        - sum(share * value(score_LV[i, item]) for item, share in label.items())
        for i, label in enumerate(soft_labels())
        if label
    )
    assert_close(soft[0] - plain[0], moved)
    assert moved != 0


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
    query_BLD, item_VD, _ = encode(module, params, *batch[:3], method='forward')
    score_LV = float64(query_BLD)[0] @ float64(item_VD).T
    expected = 0.0
    for i, target in enumerate(fields['targets'][0]):
        expected += math.log(1 + math.exp(-score_LV[i, target]))
        expected += math.log(1 + math.exp(score_LV[i, 7]))
    f = compile_objective(module, loss='bce', num_negatives=200)
    total, number, _ = f(params, batch, new_key(0))
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
    query_BLD, item_VD, _ = encode(module, params, *batch[:3], method='forward')
    score_LV = float64(query_BLD)[0] @ float64(item_VD).T
    total, number, _ = compile_objective(module, loss='sampled', num_negatives=9)(
        params, batch, new_key(0)
    )
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
    f = compile_gradient(module, loss=loss, num_negatives=4)
    one, same, other = (f(params, BATCH, new_key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert bool(one[0][0] != other[0][0]) == drawn
    assert one[0][1] == other[0][1] == 7
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))
    assert one[0][0].dtype == one[0][1].dtype == np.float32


def test_a_batch_without_weights_is_zero_and_has_no_gradient(model):
    module, params = model
    empty = BATCH._replace(weights_BL=0 * BATCH.weights_BL)
    (total, number), gradient = compile_gradient(module)(params, empty, new_key(0))
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


def test_the_loss_uses_the_dropped_item_vectors_of_the_forward_pass():
    """CORE drops entries of item vectors; chunks of items use the vectors of that one draw."""
    module, params = make_model('core', item_dropout=0.5)
    dropout_key, _ = jax.random.split(new_key(0))
    train = {'train': True, 'rngs': {'dropout': dropout_key}, 'method': 'forward'}
    query_BLD, item_VD, _ = encode(module, params, *BATCH[:3], **train)
    score_LV = float64(query_BLD)[0] @ float64(item_VD).T
    expected = 0.0
    for i, target in enumerate(BATCH.targets_BL[0]):
        if target:
            expected += np.log(np.exp(score_LV[i, 1:]).sum()) - score_LV[i, target]
    for chunk_items in (0, 5):
        f = compile_objective(module, chunk_items=chunk_items)
        assert_close(f(params, BATCH, new_key(0))[0], expected)


@pytest.mark.parametrize(
    'num_items, backend, tokens',
    [(11_924, 'cpu', 128), (2**18, 'gpu', 2**10), (2**20, 'gpu', 2**8), (2**30, 'gpu', 1)],
)
def test_default_chunks_depend_on_device_and_memory(num_items, backend, tokens):
    assert objective.default_chunk_tokens(num_items, backend) == tokens


def test_a_given_chunk_is_taken():
    chunks = [objective.chunk_tokens(LossOptions(chunk_tokens=n), 10) for n in (-1, 0, 7)]
    assert chunks == [128, 0, 7]


def test_a_loss_that_a_model_has_not_is_refused():
    make_model('sasrec')[0].validate_loss(LossOptions('bce'))
    with pytest.raises(ValueError, match='loss=bce is not for BERT4Rec, which is trained by ce'):
        make_model('bert4rec')[0].validate_loss(LossOptions('bce'))


def test_a_term_is_added_by_its_mean():
    total, mean = objective.add_term(np.float32(6), np.float32(4), (9.0, 3.0), 2)
    assert_close(total / 4, 6 / 4 + 2 * 9 / 3)
    assert mean == 3
    assert objective.add_term(np.float32(6), np.float32(4), (0.0, 0.0), 2) == (6, 0)


def test_negatives_by_popularity_count_by_their_probability():
    """Of two items, one is drawn nine times in ten; a softmax has its target once."""
    module, params = make_model('sasrec', temperature=0.5)
    params['item_table'] = params['item_table'][:3]
    module = module.clone(num_items=2)
    batch = make_batch(
        {'tokens': [[1, 2]], 'positions': [[0, 1]], 'segments': [[1, 1]], 'targets': [[2, 1]]}
    )
    query_BLD, item_VD, _ = encode(module, params, *batch[:3], method='forward')
    score_LV = float64(query_BLD)[0] @ float64(item_VD).T
    popularity_V = losses.cumulative_counts(np.array([0, 89, 9]))
    f = compile_objective(
        module,
        loss='sampled',
        num_negatives=9,
        negatives='popularity',
        popularity_V=popularity_V,
    )
    total, number, _ = f(params, batch, new_key(0))
    margins = score_LV[0, 1] - score_LV[0, 2], score_LV[1, 2] - score_LV[1, 1]
    possible = [
        math.log(1 + ones / 9 / 0.9 * math.exp(margins[0]))
        + math.log(1 + (9 - ones) / 9 / 0.1 * math.exp(margins[1]))
        for ones in range(10)
    ]
    assert min(abs(total - value) for value in possible) < 1e-5
    assert number == 2
