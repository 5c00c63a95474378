"""eSASRec against explicit float64 loops; its gates, dependencies, packing and size."""

import math

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
    rows,
)
from oracles import attention_loop, comparable_loop, norm_loop

from fame_jax.models.esasrec import SwiGLU


def sigmoid_loop(x):
    """The logistic function of one vector."""
    return np.array([1 / (1 + math.exp(-entry)) for entry in x])


def gate_loop(x_D, p):
    """The share of a sublayer's output that is added, entry by entry."""
    return sigmoid_loop(x_D @ p['kernel'] + p['bias'])


def swiglu_loop(x_D, p):
    """SwiGLU of one vector; `p` has the three kernels."""
    gate = x_D @ p['gate']['kernel']
    return (gate * sigmoid_loop(gate) * (x_D @ p['up']['kernel'])) @ p['down']['kernel']


def block_loop(x_LD, segments_L, p):
    """One block of one row, [L, D]."""
    normed_LD = np.array([norm_loop(x_D, p['attention_norm']) for x_D in x_LD])
    mixed_LD, _ = attention_loop(normed_LD, segments_L, p['attention'], 'head')
    out_LD = np.zeros(x_LD.shape)
    for i, x_D in enumerate(x_LD):
        h_D = x_D + gate_loop(x_D, p['attention_gate']) * mixed_LD[i]
        inner_D = swiglu_loop(norm_loop(h_D, p['feed_forward_norm']), p['feed_forward'])
        out_LD[i] = h_D + gate_loop(h_D, p['feed_forward_gate']) * inner_D
    return out_LD


def row_loop(p, tokens_L, positions_L, segments_L, module):
    """Queries of one row, [L, D]."""
    x_LD = np.array([p['item_table'][token] for token in tokens_L])
    if module.positions != 'relative':
        x_LD = x_LD + p['position_table'][positions_L]
    for n in range(module.num_blocks):
        x_LD = block_loop(x_LD, segments_L, p[f'block_{n}'])
    return np.array([comparable_loop(x_D, module.similarity, module.temperature) for x_D in x_LD])


CASES = [
    (1, {}),
    (2, {'num_heads': 1, 'inner_multiple': 1}),
    (5, {'positions': 'relative', 'max_length': 3, 'num_blocks': 2}),
    (5, {'positions': 'both', 'similarity': 'cosine', 'num_heads': 4}),
    (5, {'num_blocks': 3, 'inner_multiple': 2}),
]


@pytest.mark.parametrize('length, options', CASES)
def test_matches_the_loop(length, options):
    module, params = make_model('esasrec', **options)
    fields = rows(length)
    query_BLD, item_VD, _ = encode(module, params, *fields, method='forward')
    p = float64(params)
    for query_LD, tokens_L, positions_L, segments_L in zip(query_BLD, *fields, strict=True):
        expected_LD = row_loop(p, tokens_L, positions_L, segments_L, module)
        assert_close(query_LD[segments_L > 0], expected_LD[segments_L > 0], 2e-5)
    assert_close(item_VD, [comparable_loop(x_D, module.similarity) for x_D in p['item_table']])


def test_swiglu_of_one_number_by_hand():
    """SiLU(2) * 3 through kernels of one entry each."""
    kernels = {'gate': 2.0, 'up': 3.0, 'down': 5.0}
    params = {name: {'kernel': np.array([[entry]])} for name, entry in kernels.items()}
    x_BLD = np.ones((1, 1, 1))
    out_BLD = SwiGLU(1, 0.0, np.float32).apply({'params': params}, x_BLD, train=False)
    assert_close(out_BLD[0, 0, 0], 2 / (1 + math.exp(-2)) * 3 * 5)
    everything, rngs = SwiGLU(1, 1.0, np.float32), {'dropout': new_key(0)}
    assert everything.apply({'params': params}, x_BLD, train=True, rngs=rngs)[0, 0, 0] == 0


@pytest.mark.parametrize('bias, share', [(-100, 0), (100, 1)])
def test_closed_gates_add_nothing_and_open_gates_all(bias, share):
    module, params = make_model('esasrec', positions='relative')
    block = params['block_0']
    for name in ('attention_gate', 'feed_forward_gate'):
        block[name]['kernel'], block[name]['bias'] = 0 * block[name]['kernel'], np.full(8, bias)
    tokens_BL, _, segments_BL = fields = rows(5)
    query_BLD, _ = encode(module, params, *fields)
    p = float64(params)
    for b, segments_L in enumerate(segments_BL):
        expected_LD = p['item_table'][tokens_BL[b]]
        if share:
            expected_LD = block_loop(expected_LD, segments_L, p['block_0'])
        assert_close(query_BLD[b][segments_L > 0], expected_LD[segments_L > 0], 2e-5)


@pytest.mark.slow
def test_a_query_depends_on_its_own_prefix_alone():
    assert_depends_on_prefix_alone(*make_model('esasrec', num_blocks=2))


@pytest.mark.slow
@pytest.mark.parametrize('positions', ['start', 'both'])
def test_packing_changes_neither_loss_nor_gradients(positions):
    # A key's bias adds the same to all logits of a query.
    idle = {'block_0/attention/key_bias'}
    assert_packing_changes_nothing(*make_model('esasrec', positions=positions), idle)


def test_the_last_column_alone():
    module, params = make_model('esasrec', num_blocks=2)
    fields = rows(5)
    full_BLD, _ = encode(module, params, *fields)
    last_B1D, parts = encode(module, params, *fields, last=True)
    assert_close(last_B1D, full_BLD[:, -1:])
    assert parts['block_0']['attention_BHNQS'].shape == (4, 2, 1, 5, 5)
    assert parts['block_1']['attention_BHNQS'].shape == (4, 2, 1, 1, 5)


def test_number_of_parameters():
    items, positions, norm, gate = 13 * 8, 6 * 8, 8 + 8, 8 * 8 + 8
    attention = 3 * (8 * 8 + 8) + (8 * 8 + 8)
    for multiple in (1, 4):
        block = attention + 3 * 8 * (multiple * 8) + 2 * norm + 2 * gate
        module, _ = make_model('esasrec', num_blocks=2, inner_multiple=multiple)
        assert count_parameters(module) == items + positions + 2 * block


def test_dropping_everything_leaves_zeros():
    module, params = make_model('esasrec', dropout=1.0)
    query_BLD, _ = encode(module, params, *rows(5), train=True, rngs={'dropout': new_key(0)})
    assert not np.any(query_BLD)
