"""SASRec against explicit float64 loops; its reach, packing, size and both tables of items."""

from functools import partial

import jax
import numpy as np
import pytest
from layers_test import (
    assert_close,
    block_loop,
    float64,
    new_key,
    norm_loop,
    quick_jit,
    random_tree,
    rows,
)

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.config import Config
from fame_jax.models import build

# Histories 1 2 3 4 5, 6 7 3 and 8 1, as rows: side by side, one to a row, and one to a row's end.
PACKED = {
    'tokens': [[1, 2, 3, 4, 6, 7, 8, 0], [0] * 8, [0] * 8],
    'positions': [[0, 1, 2, 3, 0, 1, 0, 0], [0] * 8, [0] * 8],
    'segments': [[1, 1, 1, 1, 2, 2, 3, 0], [0] * 8, [0] * 8],
    'targets': [[2, 3, 4, 5, 7, 3, 1, 0], [0] * 8, [0] * 8],
}
ALONE = {
    'tokens': [[1, 2, 3, 4, 0, 0, 0, 0], [6, 7, 0, 0, 0, 0, 0, 0], [8, 0, 0, 0, 0, 0, 0, 0]],
    'positions': [[0, 1, 2, 3, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0], [0] * 8],
    'segments': [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]],
    'targets': [[2, 3, 4, 5, 0, 0, 0, 0], [7, 3, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]],
}
AT_THE_END = {name: [row[4:] + row[:4] for row in ALONE[name]] for name in ALONE}
AT_THE_END['segments'] = [[0, 0, 0, 0, *row[4:]] for row in AT_THE_END['segments']]


def make_batch(fields):
    """A Batch of hand-written rows; a weight of 1 wherever there is a target."""
    fields = [np.array(fields[name], np.int32) for name in PACKED]
    return Batch(*fields, (fields[-1] > 0).astype(np.float32))


def make_model(name, seed=0, **options):
    """A small model, and parameters large enough for every part of it to show."""
    default = {'width': 8, 'num_heads': 2, 'num_experts': 3, 'num_blocks': 1}
    default |= {'dropout': 0.0, 'max_length': 6}
    module = build.build(name, Config(**default | options), num_items=12)
    shapes = jax.eval_shape(partial(build.initial, module), new_key(0))
    return module, random_tree(shapes, seed)


def encode(module, params, *fields, **options):
    return quick_jit(partial(module.apply, **options))({'params': params}, *fields)


def loss_and_gradient(module):
    """(params, batch) -> summed cross-entropy and its gradient, without dropout."""

    def loss(params, batch):
        query_BLD, item_VD = module.apply({'params': params}, *batch[:3], method='query_and_items')
        return losses.cross_entropy(
            query_BLD.reshape(-1, query_BLD.shape[-1]),
            item_VD,
            batch.targets_BL.reshape(-1),
            batch.weights_BL.reshape(-1),
        )[0]

    return quick_jit(jax.value_and_grad(loss))


def reached(module, params, tokens_BL, positions_BL, segments_BL):
    """Which item a position's query depends on; bool [B, L, V + 1], read off the gradient."""
    direction_D = np.random.default_rng(3).normal(size=module.width).astype(np.float32)

    def outputs(item_table):
        tree = {'params': params | {'item_table': item_table}}
        return module.apply(tree, tokens_BL, positions_BL, segments_BL)[0] @ direction_D

    slope_BLVD = quick_jit(jax.jacrev(outputs))(params['item_table'])
    return np.abs(slope_BLVD).max(axis=-1) > 0


def assert_reach_is_the_prefix(module, params):
    """A packed row and one at a row's end, each of distinct items, so that an item is a place."""
    tokens_BL = np.array([[1, 2, 3, 4, 5, 0], [0, 0, 6, 7, 8, 9]], np.int32)
    segments_BL = np.array([[1, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 1]], np.int32)
    positions_BL = np.array([[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]], np.int32)
    prefixes = {
        (0, 0): [1],
        (0, 1): [1, 2],
        (0, 2): [1, 2, 3],
        (0, 3): [4],
        (0, 4): [4, 5],
        (1, 2): [6],
        (1, 3): [6, 7],
        (1, 4): [6, 7, 8],
        (1, 5): [6, 7, 8, 9],
    }
    reached_BLV = reached(module, params, tokens_BL, positions_BL, segments_BL)
    for place, prefix in prefixes.items():
        assert np.flatnonzero(reached_BLV[place]).tolist() == prefix


def assert_packing_changes_nothing(module, params, idle):
    """The same loss and gradients wherever histories lie; `idle` leaves are the ones without."""
    f = loss_and_gradient(module)
    loss, gradient = f(params, make_batch(ALONE))
    for fields in (PACKED, AT_THE_END):
        other_loss, other_gradient = f(params, make_batch(fields))
        assert_close(other_loss, loss)
        jax.tree.map(assert_close, other_gradient, gradient)
    assert not np.any(gradient['item_table'][0])
    largest = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x: abs(x).max(), gradient))
    without = {jax.tree_util.keystr(p, simple=True, separator='/') for p, g in largest if g < 1e-5}
    assert without == idle


def sasrec_loop(p, tokens_L, positions_L, segments_L, config):
    """Queries of one row, [L, D]."""
    x_LD = np.zeros((len(tokens_L), p['item_table'].shape[1]))
    for i, (token, position) in enumerate(zip(tokens_L, positions_L)):
        x_LD[i] = p['item_table'][token]
        if config.positions != 'relative':
            x_LD[i] += p['position_table'][position]
        x_LD[i] = norm_loop(x_LD[i], p['input_norm'])
    for n in range(config.num_blocks):
        block = p[f'block_{n}']
        assert ('distance' in block['attention']) == (config.positions != 'start')
        x_LD, _ = block_loop(x_LD, segments_L, block, config.attention_scale, config.activation)
    return np.array([comparable_loop(x_D, config.similarity, config.temperature) for x_D in x_LD])


def comparable_loop(x_D, similarity, temperature=1.0):
    length = np.sqrt(sum(entry * entry for entry in x_D))
    return x_D if similarity == 'dot' or not length else x_D / length / temperature


CASES = [
    (1, {'num_heads': 1, 'similarity': 'dot'}),
    (2, {'positions': 'both'}),
    (5, {'positions': 'relative', 'max_length': 3, 'num_blocks': 2}),
    (5, {'positions': 'start', 'similarity': 'dot', 'attention_bias': False}),
    (5, {'num_heads': 4, 'attention_scale': 'model', 'tied_items': False, 'temperature': 0.5}),
    (5, {'positions': 'both', 'activation': 'relu', 'inner_multiple': 1, 'num_blocks': 3}),
]


@pytest.mark.parametrize('length, options', CASES)
def test_matches_the_loop(length, options):
    module, params = make_model('sasrec', **options)
    fields = rows(length)
    query_BLD, item_VD = encode(module, params, *fields, method='query_and_items')
    p = float64(params)
    for query_LD, tokens_L, positions_L, segments_L in zip(query_BLD, *fields, strict=True):
        expected_LD = sasrec_loop(p, tokens_L, positions_L, segments_L, module)
        assert_close(query_LD[segments_L > 0], expected_LD[segments_L > 0], 2e-5)
    table_VD = p['item_table' if module.tied_items else 'output_table']
    assert_close(item_VD, [comparable_loop(x_D, module.similarity) for x_D in table_VD])


@pytest.mark.parametrize('positions, blocks', [('relative', 2), ('both', 1)])
def test_a_query_depends_on_its_own_prefix_alone(positions, blocks):
    assert_reach_is_the_prefix(*make_model('sasrec', positions=positions, num_blocks=blocks))


@pytest.mark.parametrize('positions, blocks', [('relative', 2), ('start', 1)])
def test_packing_changes_neither_loss_nor_gradients(positions, blocks):
    module, params = make_model('sasrec', positions=positions, num_blocks=blocks)
    # A key's bias adds the same to all logits of a query.
    idle = {f'block_{n}/attention/key_bias' for n in range(blocks)}
    assert_packing_changes_nothing(module, params, idle)


@pytest.mark.parametrize('positions', ['relative', 'both'])
def test_a_history_means_the_same_in_a_row_of_any_length(positions):
    module, params = make_model('sasrec', positions=positions)
    batch = make_batch(ALONE)
    query_BLD, _ = encode(module, params, *batch[:3])
    short_BLD, _ = encode(module, params, *(field[:1, :4] for field in batch[:3]))
    assert_close(short_BLD, query_BLD[:1, :4])


def test_asked_for_the_last_column():
    module, params = make_model('sasrec', positions='both', num_blocks=2)
    fields = rows(5)
    full_BLD, _ = encode(module, params, *fields)
    last_B1D, parts = encode(module, params, *fields, last=True)
    assert_close(last_B1D, full_BLD[:, -1:])
    assert parts['block_0']['attention_BHNQS'].shape == (4, 2, 1, 5, 5)
    assert parts['block_1']['attention_BHNQS'].shape == (4, 2, 1, 1, 5)


def count(module):
    shapes = jax.eval_shape(partial(build.initial, module), new_key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


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
        ({'tied_items': False}, items),
        ({'attention_bias': False}, -2 * 3 * 8),
    ]
    for option, more in options:
        assert count(make_model('sasrec', num_blocks=2, **option)[0]) == total + more


def test_an_untied_table_only_scores():
    module, params = make_model('sasrec', tied_items=False)
    batch = make_batch(ALONE)
    _, gradient = loss_and_gradient(module)(params, batch)
    read = np.flatnonzero(np.abs(gradient['item_table']).max(axis=1)).tolist()
    scored = np.flatnonzero(np.abs(gradient['output_table']).max(axis=1)).tolist()
    assert read == [1, 2, 3, 4, 6, 7, 8]
    assert scored == list(range(1, 13))
    query_BLD, _ = encode(module, params, *batch[:3])
    other = params | {'output_table': params['output_table'] + 1}
    np.testing.assert_array_equal(encode(module, other, *batch[:3])[0], query_BLD)


def test_an_item_of_zeros_is_no_fault():
    module, params = make_model('sasrec', tied_items=False)
    params['output_table'] = params['output_table'].at[3].set(0)

    def total(params):
        item_VD = module.apply({'params': params}, method='item_vectors')
        return item_VD.sum(), item_VD

    gradient, item_VD = quick_jit(jax.grad(total, has_aux=True))(params)
    assert not np.any(item_VD[3]) and np.isfinite(gradient['output_table']).all()


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
