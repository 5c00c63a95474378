"""Attention and block against explicit float64 loops; masks and dependencies written out by hand.

Outputs are compared at the positions of histories; at padding they only have to be finite.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import ROWS, assert_close, float64, new_key, quick_jit, random_tree
from oracles import block_loop, norm_loop, softmax_loop

from fame_jax.models import layers
from fame_jax.models.layers import AttentionSettings

# The mask and the bias, by hand.


def test_attention_mask_of_a_packed_row():
    mask_BQS = layers.attention_mask(jnp.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1]]))
    packed = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    at_the_end = [
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1],
    ]
    np.testing.assert_array_equal(np.asarray(mask_BQS, int), [packed, at_the_end])


@pytest.mark.parametrize('segments, grid', [([1], [[1]]), ([0], [[0]]), ([3], [[1]])])
def test_attention_mask_of_one_column(segments, grid):
    assert np.asarray(layers.attention_mask(jnp.array([segments])), int).tolist() == [grid]


def test_distance_bias_takes_the_last_entry_past_the_end():
    bias_HQS = layers.distance_bias(jnp.array([[5.0, 6, 7], [1, 2, 3]]), 5)
    assert bias_HQS.shape == (2, 5, 5)
    expected = [
        [5, 0, 0, 0, 0],
        [6, 5, 0, 0, 0],
        [7, 6, 5, 0, 0],
        [7, 7, 6, 5, 0],
        [7, 7, 7, 6, 5],
    ]
    np.testing.assert_array_equal(np.tril(bias_HQS[0]), expected)
    assert bias_HQS[1, 4].tolist() == [3, 3, 3, 2, 1]


@pytest.mark.parametrize('scale, divisor', [('head', 4), ('model', 8)])
def test_logits_are_divided_by_a_root(scale, divisor):
    assert AttentionSettings(num_heads=4, scale=scale).factor(64) == 1 / divisor


# Dropout.


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.75, 0.99])
def test_dropout_keeps_its_share_and_the_expectation(rate):
    f = quick_jit(lambda x, key: layers.Dropout(rate).apply({}, x, train=True, rngs=key))
    x = np.full((37, 1001), 3.0, np.float32)
    dropped = f(x, {'dropout': new_key(0)})
    kept = dropped > 0
    share = kept.mean()
    assert abs(share - (1 - rate)) < 0.5 / 256 + 4 * np.sqrt(rate * (1 - rate) / x.size)
    assert len(np.unique(dropped[kept])) == 1
    assert abs(dropped.mean() / 3 - 1) < 4 * np.sqrt(rate / (1 - rate) / x.size) / 0.8


def test_every_call_of_dropout_draws_other_bits():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            drop = layers.Dropout(0.5)
            return drop(x, train=True), drop(x, train=True)

    f = quick_jit(lambda x, key: Twice().apply({}, x, rngs=key))
    one, two = f(np.ones((3, 1001), jnp.bfloat16), {'dropout': new_key(0)})
    assert one.dtype == jnp.bfloat16
    assert 0.4 < ((one > 0) == (two > 0)).mean() < 0.6


@pytest.mark.parametrize('rate, train', [(0.5, False), (0.0, True)])
def test_without_training_or_rate_dropout_is_the_identity(rate, train):
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(layers.Dropout(rate).apply({}, x, train=train), x)


# attend, eqs. 14 and 15.


def attend(segments_BL, drop=lambda x: x, num_heads=2, num_experts=3, width=4, dtype=np.float32):
    """Random arguments of `attend`, and its results."""
    rng = np.random.default_rng(1)
    batch, length = np.shape(segments_BL)
    query_BQHNK = rng.normal(size=(batch, length, num_heads, num_experts, width)).astype(dtype)
    key_BSHK = rng.normal(size=(batch, length, num_heads, width)).astype(dtype)
    value_BSHK = rng.normal(size=(batch, length, num_heads, width)).astype(dtype)
    bias_HQS = rng.normal(size=(num_heads, length, length)).astype(np.float32)
    mask_BQS = layers.attention_mask(jnp.array(segments_BL))
    arguments = query_BQHNK, key_BSHK, value_BSHK, mask_BQS, bias_HQS
    return arguments, quick_jit(lambda *x: layers.attend(*x, 0.7, drop))(*arguments)


def test_attend_matches_the_loop():
    segments_BL = ROWS[5]
    (query, key, value, _, bias), (mixed_BQHNK, weight_BHNQS) = attend(segments_BL)
    for b, i, h, n in np.ndindex(*mixed_BQHNK.shape[:-1]):
        if not segments_BL[b][i]:
            continue
        seen = [j for j in range(i + 1) if segments_BL[b][j] == segments_BL[b][i]]
        logits = [0.7 * sum(query[b, i, h, n] * key[b, j, h]) + bias[h, i, j] for j in seen]
        weight_S = np.zeros(5)
        weight_S[seen] = softmax_loop(logits)
        assert_close(weight_BHNQS[b, h, n, i], weight_S)
        assert_close(mixed_BQHNK[b, i, h, n], sum(weight_S[j] * value[b, j, h] for j in seen))


def test_a_row_of_padding_attends_evenly():
    _, (mixed_BQHNK, weight_BHNQS) = attend([[0, 0, 0, 0], [1, 1, 0, 0]])
    np.testing.assert_allclose(weight_BHNQS[0], 0.25, rtol=1e-6)
    assert np.isfinite(mixed_BQHNK).all()
    assert (np.asarray(weight_BHNQS[1, :, :, :2, 2:]) == 0).all()


def test_dropout_is_applied_to_the_weights_of_the_sum_not_to_those_returned():
    (_, _, value, _, _), (mixed_BQHNK, weight_BHNQS) = attend(
        [[1, 1, 1]], drop=lambda w: w.at[..., 0].set(0).at[..., 1:].multiply(2)
    )
    np.testing.assert_allclose(np.sum(weight_BHNQS, axis=-1), 1, rtol=1e-6)
    weight_S = np.asarray(weight_BHNQS, np.float64)[0, 1, 2, 2]
    expected_K = 2 * weight_S[1] * value[0, 1, 1] + 2 * weight_S[2] * value[0, 2, 1]
    assert_close(mixed_BQHNK[0, 2, 1, 2], expected_K)


def test_attention_weights_are_float32():
    _, (mixed_BQHNK, weight_BHNQS) = attend([[1, 1, 1]], dtype=jnp.bfloat16)
    assert (mixed_BQHNK.dtype, weight_BHNQS.dtype) == (jnp.bfloat16, jnp.float32)


# The block.


def make_block(length, seed=0, **options):
    """A block of width 8 with random parameters, and random inputs for ROWS."""
    block = layers.Block(AttentionSettings(**{'num_heads': 2, 'max_distance': 3, **options}))
    segments_BL = np.array(ROWS[length], np.int32)
    x_BLD = np.random.default_rng(seed).normal(size=(*segments_BL.shape, 8)).astype(np.float32)
    mask_BLL = layers.attention_mask(segments_BL)
    shapes = jax.eval_shape(
        lambda: block.init(new_key(0), x_BLD, mask_BLL, train=False, last=False)
    )
    return block, random_tree(shapes, seed), x_BLD, mask_BLL, segments_BL


BLOCKS = [
    (1, {}),
    (2, {'num_heads': 1, 'max_distance': 0}),
    (5, {}),
    (5, {'num_heads': 4, 'scale': 'model'}),
    (5, {'num_heads': 8, 'bias': False, 'max_distance': 9}),
]


@pytest.mark.parametrize('length, options', BLOCKS)
def test_block_matches_the_loop(length, options):
    block, params, x_BLD, mask_BLL, segments_BL = make_block(length, **options)
    out_BLD, parts = quick_jit(partial(block.apply, train=False, last=False))(
        params, x_BLD, mask_BLL
    )
    p = float64(params['params'])
    assert ('query_bias' in p['attention']) == block.settings.bias
    assert ('distance' in p['attention']) == (block.settings.max_distance > 0)
    for x_LD, out_LD, weight_HNLL, segments_L in zip(
        float64(x_BLD), out_BLD, parts['attention_BHNQS'], segments_BL, strict=True
    ):
        expected_LD, expected_HLL = block_loop(x_LD, segments_L, p, block.settings.scale)
        real = segments_L > 0
        assert_close(out_LD[real], expected_LD[real])
        assert_close(weight_HNLL[:, 0][:, real], expected_HLL[:, real])


@pytest.mark.parametrize('length', [1, 5])
def test_block_computes_the_last_column_alone(length):
    block, params, x_BLD, mask_BLL, _ = make_block(length)

    @jax.jit
    def both(p):
        return [block.apply(p, x_BLD, mask_BLL, train=False, last=last) for last in (False, True)]

    (full_BLD, full), (last_B1D, last) = both(params)
    assert last_B1D.shape == (len(x_BLD), 1, 8)
    assert_close(last_B1D, full_BLD[:, -1:], 1e-6)
    assert_close(last['attention_BHNQS'], full['attention_BHNQS'][..., -1:, :], 1e-6)


class Apart(nn.Module):
    """Queries, keys and values by a product each."""

    settings: AttentionSettings

    @nn.compact
    def __call__(self, x_BLD):
        shape, names = (2, 6, 3), ('query', 'key', 'value')
        return [
            layers.project(self, n, shape, 'BLD,HDK->BLHK', x_BLD, self.settings) for n in names
        ]


class Together(Apart):
    """The same by one product."""

    @nn.compact
    def __call__(self, x_BLD):
        return layers.project_all(self, ('query', 'key', 'value'), (2, 6, 3), x_BLD, self.settings)


@pytest.mark.parametrize('bias', [True, False])
def test_projections_together_are_those_apart(bias):
    """Of the same parameters, which also start alike; one product of matrices in place of three."""
    settings, x_BLD = AttentionSettings(2, bias=bias), jnp.ones((1, 2, 6)).cumsum(axis=2)
    apart, together = Apart(settings), Together(settings)
    params = apart.init(new_key(0), x_BLD)
    jax.tree.map(np.testing.assert_array_equal, params, together.init(new_key(0), x_BLD))
    params = random_tree(params)
    products = []
    for module in (apart, together):
        products.append(str(jax.make_jaxpr(module.apply)(params, x_BLD)).count('dot_general['))
    assert products == [3, 1]
    for one, other in zip(apart.apply(params, x_BLD), together.apply(params, x_BLD), strict=True):
        assert_close(one, other)


def test_block_depends_on_the_positions_of_the_mask_alone():
    block, params, x_BLD, mask_BLL, segments_BL = make_block(5)
    direction_D = np.random.default_rng(2).normal(size=8).astype(np.float32)

    def outputs(x_BLD):
        return block.apply(params, x_BLD, mask_BLL, train=False, last=False)[0] @ direction_D

    slope_BQCSD = quick_jit(jax.jacrev(outputs))(x_BLD)
    nonzero_BQCS = np.abs(slope_BQCSD).max(axis=-1) > 0
    for b, segments_L in enumerate(segments_BL):
        for i in np.flatnonzero(segments_L):
            expected_CS = np.zeros(segments_BL.shape, bool)
            for j in range(i + 1):
                expected_CS[b, j] = segments_L[j] == segments_L[i]
            np.testing.assert_array_equal(nonzero_BQCS[b, i], expected_CS)


def test_dropping_everything_leaves_two_norms_of_the_input():
    block, params, x_BLD, mask_BLL, _ = make_block(5, dropout=1.0)
    rngs = {'dropout': new_key(0)}
    out_BLD, _ = quick_jit(partial(block.apply, train=True, last=False, rngs=rngs))(
        params, x_BLD, mask_BLL
    )
    p = float64(params['params'])
    first_D = norm_loop(float64(x_BLD)[0, 3], p['attention_norm'])
    assert_close(out_BLD[0, 3], norm_loop(first_D, p['feed_forward_norm']))


def test_dropout_is_applied_to_attention_weights():
    attention = layers.Attention(AttentionSettings(num_heads=2, dropout=1.0))
    _, params, x_BLD, mask_BLL, _ = make_block(2, max_distance=0)
    own = {'params': params['params']['attention']}
    rngs = {'dropout': new_key(0)}
    out_BLD, _ = quick_jit(partial(attention.apply, train=True, last=False, rngs=rngs))(
        own, x_BLD, mask_BLL
    )
    np.testing.assert_array_equal(out_BLD[1, 0], own['params']['output_bias'])


def test_dropout_is_drawn_from_the_key_and_only_in_training():
    block, params, x_BLD, mask_BLL, _ = make_block(2, dropout=0.5)

    @partial(quick_jit, static_argnums=0)
    def outputs(train, seed):
        rngs = {'dropout': new_key(seed)}
        return block.apply(params, x_BLD, mask_BLL, train=train, last=False, rngs=rngs)[0]

    assert (outputs(True, 0) == outputs(True, 0)).all()
    assert (outputs(True, 0) != outputs(True, 1)).any()
    assert (outputs(False, 0) == outputs(False, 1)).all()


def test_kernels_start_with_the_deviation_of_bert_and_biases_at_zero():
    feed_forward = layers.FeedForward(jnp.float32)
    p = quick_jit(feed_forward.init)(new_key(0), jnp.ones((1, 1, 256)))['params']
    assert abs(np.asarray(p['up']['kernel']).std() - 0.02) < 5e-4
    assert not np.any(p['up']['bias'])
