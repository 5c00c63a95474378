"""SASRec against explicit float64 loops; its dependencies, packing and size."""

import jax
import numpy as np
import pytest
from fixtures import (
    assert_close,
    assert_depends_on_prefix_alone,
    assert_packing_changes_nothing,
    count_parameters,
    encode,
    float64,
    make_model,
    new_key,
    quick_jit,
    rows,
)
from oracles import block_loop, comparable_loop, norm_loop


def sasrec_loop(p, tokens_L, positions_L, segments_L, module):
    """Queries of one row, [L, D]."""
    x_LD = np.zeros((len(tokens_L), p['item_table'].shape[1]))
    for i, (token, position) in enumerate(zip(tokens_L, positions_L)):
        x_LD[i] = p['item_table'][token]
        if module.positions != 'relative':
            x_LD[i] += p['position_table'][position]
        x_LD[i] = norm_loop(x_LD[i], p['input_norm'])
    for n in range(module.num_blocks):
        block = p[f'block_{n}']
        assert ('distance' in block['attention']) == (module.positions != 'start')
        x_LD, _ = block_loop(x_LD, segments_L, block, module.attention_scale)
    return np.array([comparable_loop(x_D, module.similarity, module.temperature) for x_D in x_LD])


CASES = [
    (1, {'num_heads': 1, 'similarity': 'dot'}),
    (2, {'positions': 'both'}),
    (5, {'positions': 'relative', 'max_length': 3, 'num_blocks': 2}),
    (5, {'positions': 'start', 'similarity': 'dot', 'attention_bias': False}),
    (5, {'num_heads': 4, 'attention_scale': 'model', 'temperature': 0.5}),
    (5, {'positions': 'both', 'num_blocks': 3}),
]


@pytest.mark.parametrize('length, options', CASES)
def test_matches_the_loop(length, options):
    module, params = make_model('sasrec', **options)
    fields = rows(length)
    query_BLD, item_VD, _ = encode(module, params, *fields, method='forward')
    p = float64(params)
    for query_LD, tokens_L, positions_L, segments_L in zip(query_BLD, *fields, strict=True):
        expected_LD = sasrec_loop(p, tokens_L, positions_L, segments_L, module)
        assert_close(query_LD[segments_L > 0], expected_LD[segments_L > 0], 2e-5)
    assert_close(item_VD, [comparable_loop(x_D, module.similarity) for x_D in p['item_table']])


def test_a_query_depends_on_its_own_prefix_alone():
    assert_depends_on_prefix_alone(*make_model('sasrec', positions='both', num_blocks=2))


@pytest.mark.parametrize('positions, blocks', [('relative', 2), ('start', 1)])
def test_packing_changes_neither_loss_nor_gradients(positions, blocks):
    module, params = make_model('sasrec', positions=positions, num_blocks=blocks)
    # A key's bias adds the same to all logits of a query.
    idle = {f'block_{n}/attention/key_bias' for n in range(blocks)}
    assert_packing_changes_nothing(module, params, idle)


def test_the_last_column_alone():
    module, params = make_model('sasrec', positions='both', num_blocks=2)
    fields = rows(5)
    full_BLD, _ = encode(module, params, *fields)
    last_B1D, parts = encode(module, params, *fields, last=True)
    assert_close(last_B1D, full_BLD[:, -1:])
    assert parts['block_0']['attention_BHNQS'].shape == (4, 2, 1, 5, 5)
    assert parts['block_1']['attention_BHNQS'].shape == (4, 2, 1, 1, 5)


def test_number_of_parameters():
    items, norm = 13 * 8, 8 + 8
    attention = 3 * (8 * 8 + 8) + (8 * 8 + 8)
    distance = 2 * 6
    feed_forward = (8 * 32 + 32) + (32 * 8 + 8)
    block = attention + norm + feed_forward + norm
    total = items + norm + 2 * (block + distance)
    options = [
        ({}, 0),
        ({'positions': 'start'}, 6 * 8 - 2 * distance),
        ({'positions': 'both'}, 6 * 8),
        ({'attention_bias': False}, -2 * 3 * 8),
    ]
    for option, more in options:
        assert count_parameters(make_model('sasrec', num_blocks=2, **option)[0]) == total + more


def test_an_item_of_zeros_has_a_finite_gradient():
    module, params = make_model('sasrec')
    params['item_table'] = params['item_table'].at[3].set(0)

    def total(params):
        item_VD = module.apply({'params': params}, method='item_vectors')
        return item_VD.sum(), item_VD

    gradient, item_VD = quick_jit(jax.grad(total, has_aux=True))(params)
    assert not np.any(item_VD[3]) and np.isfinite(gradient['item_table']).all()


def test_dropping_everything_forgets_the_history():
    module, params = make_model('sasrec', dropout=1.0)
    fields = rows(5)
    query_BLD, _ = encode(module, params, *fields, train=True, rngs={'dropout': new_key(0)})
    p = float64(params)
    x_D = np.zeros(8)
    for name in ('attention_norm', 'feed_forward_norm'):
        x_D = norm_loop(x_D, p['block_0'][name])
    expected_D = comparable_loop(x_D, 'cosine', 0.07)
    assert_close(query_BLD, np.broadcast_to(expected_D, query_BLD.shape))
