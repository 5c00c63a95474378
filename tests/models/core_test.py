"""CORE against explicit float64 loops; its weights, ranking, dependencies and packing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import (
    ALONE,
    assert_close,
    assert_depends_on_prefix_alone,
    assert_packing_changes_nothing,
    encode,
    float64,
    make_batch,
    make_model,
    new_key,
    quick_jit,
    rows,
)
from oracles import block_loop, comparable_loop, norm_loop, softmax_loop

from fame_jax.models import core

make_core = partial(make_model, 'core')


def weights_loop(p, tokens_L, positions_L, segments_L, module):
    """How much each item of a prefix counts, [L, L], zeros in the rows of padding."""
    h_LD = p['item_table'][tokens_L]
    if module.positions != 'relative':
        h_LD = h_LD + p['position_table'][positions_L]
    h_LD = np.array([norm_loop(h_D, p['input_norm']) for h_D in h_LD])
    for n in range(module.num_blocks):
        h_LD, _ = block_loop(h_LD, segments_L, p[f'block_{n}'])
    weight_LL = np.zeros((len(h_LD), len(h_LD)))
    for i in np.flatnonzero(segments_L):
        prefix = [j for j in range(i + 1) if segments_L[j] == segments_L[i]]
        logits = [sum(h_LD[j] * p['importance']['kernel'][:, 0]) for j in prefix]
        weight_LL[i, prefix] = softmax_loop(logits)
    return weight_LL


CASES = [
    (1, {}),
    (2, {'positions': 'relative', 'max_length': 3}),
    (5, {'num_blocks': 2}),
    (5, {'positions': 'both', 'similarity': 'dot'}),
]


@pytest.mark.parametrize('length, options', CASES)
def test_matches_the_loop(length, options):
    module, params = make_core(**options)
    fields = rows(length)
    query_BLD, out = encode(module, params, *fields)
    p = float64(params)
    for b, (tokens_L, positions_L, segments_L) in enumerate(zip(*fields)):
        weight_LL = weights_loop(p, tokens_L, positions_L, segments_L, module)
        real = segments_L > 0
        assert_close(out['mean']['weight_BQS'][b, real], weight_LL[real])
        for i in np.flatnonzero(real):
            mean_D = sum(weight_LL[i, j] * p['item_table'][tokens_L[j]] for j in range(length))
            expected_D = comparable_loop(mean_D, module.similarity, module.temperature)
            assert_close(query_BLD[b, i], expected_D, 2e-5)


def test_weights_of_equal_logits_by_hand():
    mask_BQS = np.array([[[1, 0, 0], [1, 1, 0], [0, 0, 1]]], bool)
    expected_QS = [[1, 0, 0], [1 / 2, 1 / 2, 0], [0, 0, 1]]
    assert_close(core.prefix_softmax(jnp.full((1, 3), 3.0), mask_BQS)[0], expected_QS)


def test_the_history_is_ranked_first():
    """Item v is the unit vector along v, so that a query's entries are the weights of the items."""
    module, params = make_core(width=16, similarity='dot')
    params['item_table'] = jnp.eye(13, 16)
    tokens_BL, positions_BL, segments_BL = rows(5)
    query_BLD, _ = encode(module, params, tokens_BL, positions_BL, segments_BL)
    assert (query_BLD >= 0).all()
    for b, i in zip(*np.nonzero(segments_BL)):
        same = segments_BL[b] == segments_BL[b, i]
        history = set(tokens_BL[b, : i + 1][same[: i + 1]].tolist())
        assert set(np.flatnonzero(query_BLD[b, i]).tolist()) == history
        assert abs(query_BLD[b, i].sum() - 1) < 1e-6
        # The cosine with item v is entry v over the length of the query: the same order.
        ranking = np.argsort(-query_BLD[b, i]).tolist()
        assert set(ranking[: len(history)]) == history


@pytest.mark.slow
def test_a_query_depends_on_its_own_prefix_alone():
    assert_depends_on_prefix_alone(*make_core(positions='both', num_blocks=2))


@pytest.mark.slow
def test_packing_changes_neither_loss_nor_gradients():
    # The bias of a key, and the last one before the weights, add the same to all of a softmax.
    idle = {'block_0/attention/key_bias', 'block_0/feed_forward_norm/bias'}
    assert_packing_changes_nothing(*make_core(positions='both'), idle)


def test_the_last_column_alone_of_rows_that_begin_with_padding():
    module, params = make_core(num_blocks=2)
    fields = make_batch(ALONE)[:3]
    ends = [3, 1, 0]
    shifted = [np.array([np.roll(row, 7 - i) for row, i in zip(x_BL, ends)]) for x_BL in fields]
    full_BLD, full = encode(module, params, *fields)
    last_B1D, last = encode(module, params, *shifted, last=True)
    assert last_B1D.shape == (3, 1, 8)
    for b, i in enumerate(ends):
        assert_close(last_B1D[b, 0], full_BLD[b, i], 1e-6)
        weight_L = full['mean']['weight_BQS'][b, i]
        assert_close(last['mean']['weight_BQS'][b, 0], np.roll(weight_L, 7 - i), 1e-6)


# Dropout of items.


def both_sides(module, params, train):
    """Queries of histories of one item, items 1 to 12, and the item vectors."""
    tokens_BL = np.arange(1, 13, dtype=np.int32)[:, None]
    method = partial(module.apply, train=train, rngs={'dropout': new_key(0)})
    f = quick_jit(partial(method, method='forward'))
    return f({'params': params}, tokens_BL, 0 * tokens_BL, np.ones_like(tokens_BL))[:2]


def test_items_are_dropped_in_the_mean_and_in_the_item_vectors():
    module, params = make_core(width=64, similarity='dot', item_dropout=0.5)
    query_BLD, item_VD = both_sides(module, params, train=True)
    table_VD = np.asarray(params['item_table'])
    for dropped_VD in (query_BLD[:, 0], item_VD[1:]):
        kept = dropped_VD != 0
        assert 0.4 < kept.mean() < 0.6
        assert_close(dropped_VD[kept], 2 * table_VD[1:][kept])
    assert ((query_BLD[:, 0] != 0) != (item_VD[1:] != 0)).any()


def test_dropped_candidates_are_of_unit_length():
    module, params = make_core(item_dropout=0.5)
    _, item_VD = both_sides(module, params, train=True)
    table_VD = float64(params['item_table'])
    for item_D, table_D in zip(item_VD, table_VD, strict=True):
        assert_close(item_D, comparable_loop(np.where(item_D != 0, table_D, 0), 'cosine'))
    assert 0.3 < (item_VD != 0).mean() < 0.7


def test_items_are_not_dropped_outside_of_training():
    module, params = make_core(item_dropout=0.5, similarity='dot')
    query_BLD, item_VD = both_sides(module, params, train=False)
    np.testing.assert_array_equal(item_VD, params['item_table'])
    assert_close(query_BLD[:, 0], params['item_table'][1:])


@pytest.mark.slow
def test_dropping_everything_has_finite_gradients():
    module, params = make_core(item_dropout=1.0)

    def total(params):
        rngs, fields = {'dropout': new_key(0)}, rows(5)
        options = {'train': True, 'rngs': rngs, 'method': 'forward'}
        query_BLD, item_VD, _ = module.apply({'params': params}, *fields, **options)
        return query_BLD.sum() + item_VD.sum(), (query_BLD, item_VD)

    gradient, sides = quick_jit(jax.grad(total, has_aux=True))(params)
    assert not any(np.any(side) for side in sides)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
