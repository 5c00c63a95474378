"""Atten-Mixer against explicit float64 loops; its levels, its pooling and packing."""

from functools import partial

import jax
import numpy as np
import pytest
from fixtures import (
    assert_close,
    assert_depends_on_prefix_alone,
    assert_packing_changes_nothing,
    encode,
    float64,
    make_model,
    new_key,
    quick_jit,
    rows,
)
from oracles import comparable_loop, norm_loop, softmax_loop

from fame_jax.models import atten_mixer, registry

make_mixer = partial(make_model, 'atten_mixer', num_levels=3)


# The equations, a query, a level, a head and an item at a time.


def dense_loop(x, p):
    return x @ p['kernel'] + p['bias']


def level_queries_loop(h_LD, p, levels):
    """Of a prefix's end, [N, D]: each entry over its length along the levels."""
    _, width = h_LD.shape
    raw_ND = []
    for k in range(1, levels + 1):
        parts = [h_LD[-j] if j <= len(h_LD) else np.zeros(width) for j in range(1, k + 1)]
        raw_ND.append(dense_loop(np.concatenate(parts), p[f'level_{k}']))
    return np.array([comparable_loop(entry_N, 'cosine') for entry_N in np.transpose(raw_ND)]).T


def pool_loop(logit_NL, norm):
    """The weights of one head from its logits at each level."""
    share_NL = np.array([softmax_loop(2 / (1 + np.exp(-logit_L))) for logit_L in logit_NL])
    pooled_L = [sum(share**norm for share in share_N) ** (1 / norm) for share_N in share_NL.T]
    return softmax_loop([2 * pooled for pooled in pooled_L])


def prefix_loop(items, p, module):
    """The query of one prefix, [D], and its weights, [H, L]."""
    h_LD = np.array([comparable_loop(p['item_table'][item], module.similarity) for item in items])
    level_ND = level_queries_loop(h_LD, p, module.num_levels)
    share = module.width // module.num_heads
    mixed_D, weight_HL = np.zeros(module.width), []
    for h in range(module.num_heads):
        own = slice(h * share, (h + 1) * share)
        logit_NL = np.array(
            [
                [dense_loop(q_D, p['query'])[own] @ dense_loop(h_D, p['key'])[own] for h_D in h_LD]
                for q_D in level_ND
            ]
        )
        weight_HL.append(pool_loop(logit_NL, module.pooling_norm))
        for weight, h_D in zip(weight_HL[h], h_LD):
            mixed_D[own] += weight * dense_loop(h_D, p['value'])[own]
    both = np.concatenate([norm_loop(mixed_D, p['norm']), h_LD[-1]])
    out_D = dense_loop(both, p['output'])
    return comparable_loop(out_D, module.similarity, module.temperature), np.array(weight_HL)


CASES = [
    (1, {}),
    (5, {}),
    (5, {'num_levels': 7, 'num_heads': 4, 'pooling_norm': 1.0}),
    (5, {'num_levels': 1, 'num_heads': 1, 'similarity': 'dot'}),
]


@pytest.mark.parametrize('length, options', CASES)
def test_matches_the_loop(length, options):
    module, params = make_mixer(**options)
    tokens_BL, positions_BL, segments_BL = fields = rows(length)
    query_BLD, item_VD, parts = encode(module, params, *fields, method='forward')
    p = float64(params)
    for b, i in np.argwhere(segments_BL > 0):
        start = i - positions_BL[b, i]
        expected_D, weight_HL = prefix_loop(tokens_BL[b, start : i + 1], p, module)
        assert_close(query_BLD[b, i], expected_D, 2e-5)
        weight_HS = parts['attention_BHQS'][b, :, i]
        assert_close(weight_HS[:, start : i + 1], weight_HL)
        assert not weight_HS[:, :start].any() and not weight_HS[:, i + 1 :].any()
    assert_close(item_VD, [comparable_loop(x_D, module.similarity) for x_D in p['item_table']])


def test_the_last_items_of_each_position():
    x_BLD = np.tile(np.arange(1, 7, dtype=np.float32)[None, :, None], (2, 1, 1))
    segments_BL = np.array([[1, 1, 1, 2, 2, 0], [0, 2, 1, 1, 1, 1]])
    packed = [[1, 0, 0], [2, 1, 0], [3, 2, 1], [4, 0, 0], [5, 4, 0], [0, 0, 0]]
    at_the_end = [[0, 0, 0], [2, 0, 0], [3, 0, 0], [4, 3, 0], [5, 4, 3], [6, 5, 4]]
    f = partial(atten_mixer.recent_items, num_levels=3)
    recent_BLD = quick_jit(partial(f, last=False))(x_BLD, segments_BL)
    np.testing.assert_array_equal(recent_BLD, [packed, at_the_end])
    last_B1D = quick_jit(partial(f, last=True))(x_BLD, segments_BL)
    np.testing.assert_array_equal(last_B1D, recent_BLD[:, -1:])


@pytest.mark.slow
def test_a_query_depends_on_its_own_prefix_alone():
    assert_depends_on_prefix_alone(*make_mixer(num_levels=2))


@pytest.mark.slow
def test_packing_changes_neither_loss_nor_gradients():
    assert_packing_changes_nothing(*make_mixer(), idle=set())


@pytest.mark.slow
@pytest.mark.parametrize('levels', [1, 7])
def test_the_last_column_alone(levels):
    module, params = make_mixer(num_levels=levels)
    fields = rows(5)
    full_BLD, full = encode(module, params, *fields)
    last_B1D, last = encode(module, params, *fields, last=True)
    ends = fields[2][:, -1] > 0  # rows of padding have no query
    assert_close(last_B1D[ends], full_BLD[ends, -1:])
    assert_close(last['attention_BHQS'][ends], full['attention_BHQS'][ends][:, :, -1:])


@pytest.mark.parametrize('levels, norm', [(1, 4.0), (3, 1.0), (3, 64.0)])
def test_pooling_and_its_gradient(levels, norm):
    def weigh(logit_NL, mask_L):
        logits = [logit_L[None, None, None] for logit_L in logit_NL]
        weight_L = atten_mixer.pool_levels(logits, mask_L[None, None, None], norm)[0, 0, 0]
        return weight_L, weight_L

    f = quick_jit(jax.jacrev(weigh, has_aux=True))
    for seen, scale in np.ndindex(6, 3):
        rng = np.random.default_rng(seen)
        logit_NL = ([0, 1, 100][scale] * rng.normal(size=(levels, 6))).astype(np.float32)
        slope_LNL, weight_L = f(logit_NL, np.arange(6) <= seen)
        assert np.isfinite(slope_LNL).all()
        expected_L = np.zeros(6)
        # In float64 even the sixty-fourth power of a small share is a number.
        expected_L[: seen + 1] = pool_loop(logit_NL[:, : seen + 1].astype(np.float64), norm)
        assert_close(weight_L, expected_L)


@pytest.mark.slow
def test_a_row_of_padding_has_uniform_weights():
    module, params = make_mixer()
    zeros_BL = np.zeros((2, 4), np.int32)
    query_BLD, parts = encode(module, params, zeros_BL, zeros_BL, zeros_BL)
    assert np.isfinite(query_BLD).all()
    np.testing.assert_allclose(parts['attention_BHQS'], 1 / 4, rtol=1e-6)


def test_dropout_of_items_weights_and_item_vectors():
    module, params = make_mixer(dropout=1.0, item_dropout=0.5)
    rngs = {'dropout': new_key(0)}
    fields = rows(5)

    def both(train):
        f = partial(module.apply, method='forward', train=train, rngs=rngs)
        return quick_jit(f)({'params': params}, *fields)[:2]

    (query_BLD, item_VD), (still_BLD, still_VD) = both(True), both(False)
    p = float64(params)
    # With neither items nor weights, LayerNorm gives its bias and the item is zeros.
    mixed_D = np.concatenate([p['norm']['bias'], np.zeros(8)])
    expected_D = comparable_loop(dense_loop(mixed_D, p['output']), 'cosine', 1 / 16)
    assert_close(query_BLD, np.broadcast_to(expected_D, query_BLD.shape), 2e-5)
    kept_VD = item_VD != 0
    assert 0.3 < kept_VD.mean() < 0.7
    assert_close(item_VD, np.where(kept_VD, 2 * still_VD, 0))
    assert_close(still_BLD, encode(module, params, *fields)[0])


def test_parameters_start_as_the_authors():
    module, _ = make_mixer(width=64)
    params = registry.init_params(module, new_key(0))
    for name in ('level_1', 'level_3', 'query', 'output'):
        for leaf in params[name].values():
            assert 0.9 / 8 < abs(np.asarray(leaf)).max() <= 1 / 8
    assert params['level_3']['kernel'].shape == (3 * 64, 64)
