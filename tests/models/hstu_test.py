"""HSTU against explicit float64 loops; its weights, dependencies, packing and size."""

import math

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
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import comparable_loop, norm_loop

from fame_jax.models import hstu, layers, registry


def silu_loop(x):
    """SiLU of one number."""
    return x / (1 + math.exp(-x))


def plain_norm_loop(x):
    """LayerNorm of one vector without parameters."""
    return norm_loop(x, {'scale': 1, 'bias': 0})


def weights_loop(query_HK, keys, bias, divisor):
    """A position's weights of its prefix in each head, [H, prefix]; `bias` is by distance."""
    weight_HS = np.zeros((len(query_HK), len(keys)))
    for h, s in np.ndindex(weight_HS.shape):
        logit = sum(query_HK[h] * keys[s][h]) + bias[min(len(keys) - 1 - s, len(bias) - 1)]
        weight_HS[h, s] = silu_loop(logit) / divisor
    return weight_HS


def block_loop(x_LD, p, module):
    """One block of one history: [L, D], and each position's weights, a list of [H, prefix]."""
    width, num_heads = module.width, module.num_heads
    bias = p['distance'][0] if 'distance' in p else [0]
    parts = []
    for x_D in x_LD:
        product = plain_norm_loop(x_D) @ p['input']['kernel']
        gate_D, *others = np.reshape([silu_loop(entry) for entry in product], (4, width))
        parts.append((gate_D, *(x_D.reshape(num_heads, -1) for x_D in others)))
    keys = [key_HK for _, _, _, key_HK in parts]
    out_LD, weights = np.zeros(x_LD.shape), []
    for i, (gate_D, _, query_HK, _) in enumerate(parts):
        weights.append(weights_loop(query_HK, keys[: i + 1], bias, module.max_length))
        mixed_HK = np.zeros(query_HK.shape)
        for h, s in np.ndindex(weights[i].shape):
            mixed_HK[h] += weights[i][h, s] * parts[s][1][h]
        gated_D = gate_D * plain_norm_loop(mixed_HK.reshape(-1))
        out_LD[i] = x_LD[i] + gated_D @ p['output']['kernel'] + p['output']['bias']
    return out_LD, weights


def history_loop(p, items, module):
    """Queries of one history, [L, D], and its weights in the last block."""
    x_LD = np.array([math.sqrt(module.width) * p['item_table'][item] for item in items])
    if module.positions != 'relative':
        x_LD = x_LD + p['position_table'][: len(items)]
    weights = []
    for n in range(module.num_blocks):
        x_LD, weights = block_loop(x_LD, p[f'block_{n}'], module)
    query = [comparable_loop(x_D, module.similarity, module.temperature) for x_D in x_LD]
    return np.array(query), weights


CASES = [
    (1, {}),
    (2, {'num_heads': 1, 'similarity': 'dot'}),
    (5, {'positions': 'relative', 'max_length': 3, 'num_blocks': 2}),
    (5, {'positions': 'start', 'num_heads': 4, 'temperature': 0.5}),
    (5, {'num_blocks': 3}),
]


@pytest.mark.parametrize('length, options', CASES)
def test_matches_the_loop(length, options):
    module, params = make_model('hstu', **options)
    tokens_BL, _, segments_BL = fields = rows(length)
    query_BLD, item_VD, out = encode(module, params, *fields, method='forward')
    weight_BHQS = out[f'block_{module.num_blocks - 1}']['attention_BHQS']
    p = float64(params)
    assert ('distance' in p['block_0']) == (module.positions != 'start')
    for b, segments_L in enumerate(segments_BL):
        for segment in np.unique(segments_L[segments_L > 0]):
            places = np.flatnonzero(segments_L == segment)
            expected_LD, weights = history_loop(p, tokens_BL[b, places], module)
            assert_close(query_BLD[b, places], expected_LD, 2e-5)
            for i, weight_HS in zip(places, weights, strict=True):
                expected_HS = np.zeros((module.num_heads, length))
                expected_HS[:, places[: weight_HS.shape[1]]] = weight_HS
                assert_close(weight_BHQS[b, :, i], expected_HS)
    assert_close(item_VD, [comparable_loop(x_D, module.similarity) for x_D in p['item_table']])


pointwise_weights_jit = quick_jit(
    lambda query_BQHK, key_BSHK, segments_BL, bias_HQS: hstu.pointwise_weights(
        query_BQHK, key_BSHK, layers.attention_mask(segments_BL), bias_HQS, 5
    )
)


@settings(max_examples=25, deadline=None)
@given(border_L=st.lists(st.booleans(), min_size=7, max_size=7), padding=st.integers(0, 7))
def test_weights_are_those_of_the_history_alone(border_L, padding):
    """Whatever the borders, and 0 for every item of another history."""
    rng = np.random.default_rng(0)
    query_BQHK, key_BSHK = rng.normal(size=(2, 1, 7, 2, 3)).astype(np.float32)
    table_1L = rng.normal(size=(1, 4)).astype(np.float32)
    segments_L = 1 + np.cumsum(border_L, dtype=np.int32)
    segments_L[:padding] = 0
    bias_1QS = np.asarray(layers.distance_bias(table_1L, 7))
    weight_HQS = pointwise_weights_jit(query_BQHK, key_BSHK, segments_L[None], bias_1QS)[0]
    expected_HQS = np.zeros(weight_HQS.shape)
    for i in range(padding, 7):
        places = [j for j in range(i + 1) if segments_L[j] == segments_L[i]]
        keys = float64(key_BSHK)[0, places]
        expected_HQS[:, i, places] = weights_loop(
            float64(query_BQHK)[0, i], keys, float64(table_1L)[0], 5
        )
    assert_close(weight_HQS, expected_HQS)


@pytest.mark.slow
def test_a_query_depends_on_its_own_prefix_alone():
    assert_depends_on_prefix_alone(*make_model('hstu', num_blocks=2))


@pytest.mark.slow
@pytest.mark.parametrize('positions', ['both', 'relative'])
def test_packing_changes_neither_loss_nor_gradients(positions):
    assert_packing_changes_nothing(*make_model('hstu', positions=positions), idle=set())


def test_the_last_column_alone():
    module, params = make_model('hstu', num_blocks=2)
    fields = rows(5)
    full_BLD, _ = encode(module, params, *fields)
    last_B1D, parts = encode(module, params, *fields, last=True)
    assert_close(last_B1D, full_BLD[:, -1:])
    assert parts['block_0']['attention_BHQS'].shape == (4, 2, 5, 5)
    assert parts['block_1']['attention_BHQS'].shape == (4, 2, 1, 5)


def test_a_row_of_padding_has_no_weights_and_a_finite_gradient():
    module, params = make_model('hstu', num_blocks=2)
    zeros_BL = np.zeros((1, 3), np.int32)

    def total(params):
        query_BLD, parts = module.apply({'params': params}, zeros_BL, zeros_BL, zeros_BL)
        return query_BLD.sum(), parts

    gradient, parts = quick_jit(jax.grad(total, has_aux=True))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(parts))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_number_of_parameters():
    items, table, distance = 13 * 8, 6 * 8, 6
    block = 8 * (4 * 8) + (8 * 8 + 8)
    for positions, more in [
        ('both', table + 2 * distance),
        ('start', table),
        ('relative', 2 * distance),
    ]:
        module, _ = make_model('hstu', num_blocks=2, positions=positions)
        assert count_parameters(module) == items + 2 * block + more


def test_parameters_start_as_the_authors():
    module, _ = make_model('hstu', width=64, max_length=50)
    p = jax.device_get(registry.init_params(module, new_key(0)))
    deviations = [
        (p['position_table'], 1 / math.sqrt(64)),
        (p['block_0']['input']['kernel'], 0.02),
        (p['block_0']['output']['kernel'], math.sqrt(2 / (64 + 64))),
    ]
    for leaf, deviation in deviations:
        assert abs(leaf.std() / deviation - 1) < 0.05
    assert 0.01 < p['block_0']['distance'].std() < 0.03
    assert not np.any(p['block_0']['output']['bias'])


def test_dropping_everything_leaves_the_bias():
    module, params = make_model('hstu', dropout=1.0)
    query_BLD, _ = encode(module, params, *rows(5), train=True, rngs={'dropout': new_key(0)})
    bias_D = float64(params)['block_0']['output']['bias']
    expected_D = comparable_loop(bias_D, 'cosine', module.temperature)
    assert_close(query_BLD, np.broadcast_to(expected_D, query_BLD.shape))
