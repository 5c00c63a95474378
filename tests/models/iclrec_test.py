"""ICLRec's contrasts and intents against explicit loops; how the intents are set."""

import math
import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import (
    assert_close,
    compile_gradient,
    compile_objective,
    float64,
    make_model,
    new_key,
    quick_jit,
)
from oracles import nt_xent_loop

from fame_jax.batch import Batch
from fame_jax.models import augmentations, iclrec, kmeans

CONTRAST = {
    'crop_share': 0.5,
    'mask_share': 0.6,
    'reorder_share': 0.8,
    'contrast_weight': 0.3,
    'contrast_temperature': 2.0,
    'contrast_anchors': 4,
    'intent_weight': 0.2,
}
LENGTHS = [[4, 3, 1], [2, 5]]  # of the histories in each row of eight; one more than anchors


def packed(lengths, seed=0):
    """A batch of random histories, each with a target at every position."""
    rng = np.random.default_rng(seed)
    tokens, positions, segments = np.zeros((3, len(lengths), 8), np.int32)
    for b, row in enumerate(lengths):
        ends = np.cumsum(row)
        for s, (end, n) in enumerate(zip(ends, row)):
            tokens[b, end - n : end] = rng.integers(1, 13, n)
            positions[b, end - n : end] = range(n)
            segments[b, end - n : end] = s + 1
    targets = np.where(segments > 0, rng.integers(1, 13, segments.shape), 0).astype(np.int32)
    return Batch(tokens, positions, segments, targets, (targets > 0).astype(np.float32))


make_iclrec = partial(
    make_model, 'iclrec', num_clusters=3, positions='both', temperature=0.5, **CONTRAST
)


def histories(h_BLD, segments_BL):
    """The encodings of each history by its columns: lists of (column, vector)."""
    actual = []
    for h_LD, segments_L in zip(float64(h_BLD), segments_BL):
        for s in range(1, max(segments_L) + 1):
            actual.append([(c, h_LD[c]) for c in range(len(h_LD)) if segments_L[c] == s])
    return actual


def mean_loop(history):
    return sum(vector for _, vector in history) / len(history)


def flat_loop(history, length):
    """Each vector as far from the end as its column is from the last one's."""
    out = np.zeros((length, len(history[0][1])))
    last = history[-1][0]
    for column, vector in history:
        out[length - 1 - (last - column)] = vector
    return out.reshape(-1)


@cache
def viewer():
    operators = [
        partial(augmentations.crop, share=CONTRAST['crop_share']),
        partial(augmentations.mask, share=CONTRAST['mask_share'], mask_id=0),
        partial(augmentations.reorder, share=CONTRAST['reorder_share']),
    ]
    f = partial(augmentations.two_views, operators=operators, different=False)
    return quick_jit(lambda key, *fields: f(key, fields))


def drawn_views(batch, key):
    """The views that the objective draws from the key."""
    return viewer()(jax.random.split(key, 3)[0], *batch[:3])


@cache
def programs(module):
    """The encoding of rows, and the objective without contrasts."""
    plain = module.clone(contrast_weight=0.0, intent_weight=0.0)
    return quick_jit(partial(module.apply, method='encode')), compile_objective(plain)


@pytest.fixture(scope='module')
def model():
    return make_iclrec()


@pytest.fixture(scope='module')
def graded(model):
    return compile_gradient(model[0])


def expected_loss(model, batch, key):
    module, params = model
    encode, item = programs(module)
    rows = [batch[:3], *drawn_views(batch, key)]
    views = [histories(encode({'params': params}, *x)[0], x[2]) for x in rows]
    views = [view[: CONTRAST['contrast_anchors']] for view in views]
    flat = [[flat_loop(history, module.max_length) for history in view] for view in views[1:]]
    instance = nt_xent_loop(*flat, CONTRAST['contrast_temperature'])
    mean, *mean_views = ([mean_loop(history) for history in view] for view in views)
    intents = float64(params['intents'])
    own = [intents[np.argmin([sum((x - c) ** 2) for c in intents])] for x in mean]
    intent = sum(nt_xent_loop(x, own, CONTRAST['contrast_temperature']) for x in mean_views) / 2
    total, count, _ = item(params, batch, key)
    more = CONTRAST['contrast_weight'] * instance + CONTRAST['intent_weight'] * intent
    return total + more * count, count


@pytest.mark.parametrize('seed, lengths', [(0, LENGTHS), (1, LENGTHS), (2, [[6], [2, 5]])])
def test_is_the_loss_and_both_contrasts(seed, lengths, model, graded):
    batch, key = packed(lengths, seed), new_key(seed)
    (total, count), _ = graded(model[1], batch, key)
    expected, expected_count = expected_loss(model, batch, key)
    assert count == expected_count == sum(map(sum, lengths))
    assert_close(total, expected, 3e-6)
    assert any((view[2] != batch.segments_BL).any() for view in drawn_views(batch, key))


def test_no_gradient_moves_the_intents(model, graded):
    _, gradient = graded(model[1], packed(LENGTHS), new_key(0))
    assert not gradient.pop('intents').any()
    largest = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x: abs(x).max(), gradient))
    still = [jax.tree_util.keystr(p, simple=True, separator='/') for p, g in largest if g < 1e-3]
    assert still == ['block_0/attention/key_bias']  # adds the same to all logits of a query


def test_rows_of_padding_cost_nothing(model, graded):
    (total, count), gradient = graded(model[1], packed([[], []]), new_key(0))
    assert total == count == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_bfloat16_is_finite():
    module, params = make_iclrec(dtype=jnp.bfloat16, dropout=0.5)
    (total, _), gradient = compile_gradient(module)(params, packed(LENGTHS), new_key(0))
    assert np.isfinite(total) and total.dtype == np.float32
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


# Packed rows with gaps, as in a view with masked items.

SEGMENTS = np.array([[1, 0, 1, 2, 0], [0, 1, 1, 0, 1]], np.int32)
INDEX = np.array([2, 3, 9], np.int32)
H = np.arange(1.0, 11, dtype=np.float32)[:, None]


def test_means_are_over_the_remaining_items_of_a_history():
    mean_A1 = quick_jit(iclrec.history_means)(H, SEGMENTS, INDEX)
    assert_close(mean_A1[:, 0], [(1 + 3) / 2, 4, (7 + 8 + 10) / 3])


def test_positions_are_concatenated_up_to_the_last():
    flat_AC = quick_jit(partial(iclrec.concatenate_positions, length=4))(H, SEGMENTS, INDEX)
    assert flat_AC.tolist() == [[0, 1, 0, 3], [0, 0, 0, 4], [7, 8, 0, 10]]


# The E-step.


def test_before_epoch_clusters_the_means_of_every_history():
    module, params = make_iclrec(dropout=0.5)
    batches = [packed(LENGTHS, seed) for seed in range(3)]
    key = new_key(7)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fresh = module.before_epoch(params, iter(batches), key)
    encode, _ = programs(module)
    means = []
    for batch in batches:
        h_BLD, _ = encode({'params': params}, *batch[:3])
        means += [mean_loop(history) for history in histories(h_BLD, batch.segments_BL)]
    assert len(means) == 15
    actual = kmeans.fit(key, np.array(means), np.ones(15), clusters=3)
    for centroid, intent in zip(float64(actual.centroid_CD), fresh['intents']):
        assert_close(intent, centroid / math.sqrt(sum(centroid**2)))
    assert {name for name in params if params[name] is not fresh[name]} == {'intents'}
    again = module.before_epoch(params, iter(batches), key)
    np.testing.assert_array_equal(again['intents'], fresh['intents'])


def test_with_fewer_histories_than_intents_some_are_copies():
    module, params = make_iclrec(num_clusters=7)
    with pytest.warns(UserWarning, match='num_clusters=7 is more than the 3 training histories'):
        intents = module.before_epoch(params, [packed([[2, 3, 2]])], new_key(0))['intents']
    assert intents.shape == (7, 8)
    assert_close(np.square(intents).sum(axis=1), np.ones(7))
    np.testing.assert_array_equal(intents[3:6], intents[:3])
    np.testing.assert_array_equal(intents[6], intents[0])
    assert len(np.unique(intents, axis=0)) == 3
