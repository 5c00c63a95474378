"""MSGIFSR against float64 loops over dictionaries of runs; its mixture, its padding, its loss."""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import (
    assert_close,
    compile_gradient,
    compile_objective,
    float64,
    new_key,
    parameter_shapes,
    quick_jit,
    random_tree,
    right_aligned,
)
from oracles import graph_layer_loop, graph_loop, softmax_loop

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.models import msgifsr
from fame_jax.models.msgifsr import MSGIFSR

V, D, LENGTH = 12, 4, 8
# A run of three met twice from two sides, the same backwards, an item next to itself, a path, too
# short for runs of three, one item, padding alone.
HISTORIES = [
    *([5, 1, 2, 3, 4, 1, 2, 3], [3, 2, 1, 4, 3, 2, 1, 5], [9, 1, 9, 9, 2, 9], [6, 7, 8, 10, 11]),
    *([3, 7], [12], []),
]


def make_module(max_unit, **options):
    default = {'num_items': V, 'width': D, 'num_heads': 2, 'dropout': 0.0, 'temperature': 0.25}
    return MSGIFSR(max_unit=max_unit, **default | options)


@cache
def make_params(max_unit, num_blocks=1, scale=0.5):
    """Parameters large enough that every term matters."""
    return random_tree(parameter_shapes(make_module(max_unit, num_blocks=num_blocks)), scale=scale)


def rows_of(histories, length=LENGTH):
    """Tokens, positions (not read) and segments, each history at its row's end."""
    tokens_BL = np.concatenate([right_aligned(history, length) for history in histories])
    return tokens_BL, np.zeros_like(tokens_BL), (tokens_BL > 0).astype(np.int32)


@cache
def encoder(max_unit, **options):
    """The model as in ranking: without dropout, though it has a rate."""
    module = make_module(max_unit, dropout=0.5, **options)

    def encode(params, *fields):
        tree = {'params': params}
        query_BQD, out = module.apply(tree, *fields, last=True)
        return query_BQD, module.apply(tree, method='item_vectors'), out

    return quick_jit(encode)


def scores(max_unit, params, histories, length=LENGTH, **options):
    """Combined scores of items 1..V, float64 [B, V]."""
    query_BQD, item_VD, _ = encoder(max_unit, **options)(params, *rows_of(histories, length))
    score_BQV = np.einsum('BQD,VD->BQV', float64(query_BQD), float64(item_VD)[1:])
    return float64(jnp.asarray(MSGIFSR.combine(jnp.asarray(score_BQV, jnp.float32))))


# The equations, a run at a time.


def unit_loop(x_D):
    return x_D / math.sqrt(sum(entry * entry for entry in x_D))


def sigmoid_loop(x_D):
    return np.array([1 / (1 + math.exp(-entry)) for entry in x_D])


def gru_loop(p, inputs):
    h = np.zeros_like(inputs[0])
    for x in inputs:
        r = sigmoid_loop(x @ p['ir']['kernel'] + p['ir']['bias'] + h @ p['hr']['kernel'])
        z = sigmoid_loop(x @ p['iz']['kernel'] + p['iz']['bias'] + h @ p['hz']['kernel'])
        inner = h @ p['hn']['kernel'] + p['hn']['bias']
        h = (1 - z) * np.tanh(x @ p['in']['kernel'] + p['in']['bias'] + r * inner) + z * h
    return h


def run_loop(p, run):
    """The initial vector of a node."""
    e = [p['item_table'][item] for item in run]
    if len(run) == 1:
        return unit_loop(e[0])
    return unit_loop(sum(e) / len(e) / 2 + gru_loop(p[f'gru_{len(run)}'], e) / 2)


def read_loop(p, h, history):
    """s of each level that has a run, and its attention on the nodes."""
    nodes = [h_D for level in h for h_D in level.values()]
    actual = []
    for k, level in enumerate(h):
        if not level:
            continue
        last = level[tuple(history[-k - 1 :])]
        logits = []
        for node in nodes:
            inner = node @ p['read_node'][k] + last @ p['read_last'][k] + p['read_bias'][k]
            logits.append(sigmoid_loop(inner) @ p['read_logit'][k])
        weights = softmax_loop(logits)
        read = sum(weight * node for weight, node in zip(weights, nodes))
        actual.append((unit_loop(np.concatenate([last, read]) @ p['output'][k]), weights))
    return actual


def msgifsr_loop(p, history, max_unit, num_blocks, temperature):
    """Log-probabilities of items 1..V."""
    nodes, edges = graph_loop(history, max_unit)
    x = [{run: run_loop(p, run) for run in level} for level in nodes]
    for i in range(num_blocks):
        x = graph_layer_loop(p[f'layer_{i}'], x, edges)
    h = [{run: unit_loop(x_D) for run, x_D in level.items()} for level in x]
    read = read_loop(p, h, history)
    shares = softmax_loop(p['level_logit'][: len(read)]) if max_unit > 1 else [1.0]
    total_V = np.zeros(V)
    for share, (s_D, _) in zip(shares, read):
        logits = [s_D @ unit_loop(p['item_table'][v]) / temperature for v in range(1, V + 1)]
        total_V += share * softmax_loop(logits)
    return np.log(total_V)


@pytest.mark.parametrize(('max_unit', 'num_blocks'), [(1, 1), (2, 2), (3, 1)])
def test_model_against_loops(max_unit, num_blocks):
    params = make_params(max_unit, num_blocks)
    actual_BV = scores(max_unit, params, HISTORIES, num_blocks=num_blocks)
    p = float64(params)
    for history, actual_V in zip(HISTORIES[:-1], actual_BV):
        expected_V = msgifsr_loop(p, history, max_unit, num_blocks, 0.25)
        if max_unit == 1:  # no log Z is subtracted
            actual_V = actual_V - math.log(sum(math.exp(score) for score in actual_V))
        assert_close(actual_V, expected_V, 2e-5)
    assert np.isfinite(actual_BV).all()


def test_the_readout_attends_to_nodes_alone():
    """Of 5 1 2 3 4 1 2 3: five items, six pairs but 12 and 23 once, six triples but 123 once."""
    _, _, out = encoder(3)(make_params(3), *rows_of(HISTORIES))
    weight_GN = out['readout_BGN'][0]
    columns = [0, 1, 2, 3, 4] + [LENGTH + i for i in range(1, 6)] + [16 + i for i in range(2, 7)]
    p = float64(make_params(3))
    nodes, edges = graph_loop(HISTORIES[0], 3)
    x = graph_layer_loop(
        p['layer_0'], [{r: run_loop(p, r) for r in level} for level in nodes], edges
    )
    h = [{run: unit_loop(x_D) for run, x_D in level.items()} for level in x]
    for weight_N, (_, expected) in zip(weight_GN, read_loop(p, h, HISTORIES[0])):
        assert np.flatnonzero(weight_N).tolist() == columns
        assert_close(weight_N[columns], expected)


def test_probabilities_over_the_catalogue_sum_to_one():
    score_BV = scores(3, make_params(3), HISTORIES)
    assert_close(np.exp(score_BV).sum(axis=1), np.ones(len(HISTORIES)))


def test_a_level_without_a_run_leaves_its_weight_to_the_others():
    """A history of one item has the items' level alone, and its scores are that level's softmax."""
    b = HISTORIES.index([12])
    query_BQD, item_VD, _ = encoder(3)(make_params(3), *rows_of(HISTORIES))
    assert (query_BQD[b, 1:, -1] < -1e8).all()
    score_V = float64(item_VD)[1:, :-1] @ float64(query_BQD)[b, 0, :-1]
    combined_V = scores(3, make_params(3), HISTORIES)[b]
    assert_close(combined_V, score_V - math.log(sum(math.exp(score) for score in score_V)))


def test_other_rows_change_nothing():
    params = make_params(3)
    whole_BQD, _, _ = encoder(3)(params, *rows_of(HISTORIES))
    for b, history in enumerate(HISTORIES[:-1]):
        alone_BQD, _, _ = encoder(3)(params, *rows_of([[]] * 3 + [history] + [[]] * 3))
        assert_close(alone_BQD[3], whole_BQD[b])


@pytest.mark.slow
def test_padding_and_other_histories_of_a_row_change_nothing():
    """In wider rows; in a packed one, other histories of equal items are no part of the graph."""
    params = make_params(3)
    tokens_BL, positions_BL, segments_BL = rows_of(HISTORIES, LENGTH + 2)
    tokens_BL[:4, :2], segments_BL[:4, :2], segments_BL[:4, 2:] = [1, 2], 1, 2
    segments_BL[tokens_BL == 0] = 0
    query_BQD, _, _ = encoder(3)(params, *rows_of(HISTORIES))
    other_BQD, _, _ = encoder(3)(params, tokens_BL, positions_BL, segments_BL)
    assert_close(other_BQD[:-1, 0, :], query_BQD[:-1, 0, :])
    for level in (1, 2):
        there = [b for b, history in enumerate(HISTORIES) if len(history) > level]
        assert_close(other_BQD[there, level], query_BQD[there, level])


@pytest.mark.parametrize('chunk', [5, 6, 40])
def test_log_partition_in_chunks(chunk):
    """The value and both gradients, whether the chunks come out even or not."""
    rng = np.random.default_rng(0)
    query_TD, item_VD = rng.normal(size=(5, D)), rng.normal(size=(V + 1, D))
    query_TD, item_VD = jnp.asarray(query_TD, jnp.float32), jnp.asarray(item_VD, jnp.float32)
    weight_T = jnp.arange(1.0, 6.0)

    def total(query_TD, item_VD):
        log_z_T = msgifsr.log_partition(query_TD, item_VD, chunk)
        return log_z_T @ weight_T, log_z_T

    f = quick_jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, log_z_T), (d_query_TD, d_item_VD) = f(query_TD, item_VD)
    power_TV = np.exp(float64(query_TD) @ float64(item_VD)[1:].T)
    assert_close(log_z_T, np.log(power_TV.sum(axis=1)))
    slope_TV = power_TV / power_TV.sum(axis=1, keepdims=True) * float64(weight_T)[:, None]
    assert_close(d_query_TD, slope_TV @ float64(item_VD)[1:])
    assert_close(d_item_VD[1:], slope_TV.T @ float64(query_TD))
    assert not np.any(d_item_VD[0])


def make_batch(histories, targets, weights):
    fields = rows_of(histories)
    target_BL, weight_BL = np.zeros_like(fields[0]), np.zeros(fields[0].shape, np.float32)
    target_BL[:, -1], weight_BL[:, -1] = targets, weights
    return Batch(*fields, target_BL, weight_BL)


BATCH = make_batch(HISTORIES, [7, 1, 2, 12, 8, 9, 0], [1, 1, 0.5, 1, 1, 1, 0])


@cache
def graded(max_unit, **options):
    """(params, batch, key) -> ((sum, count), gradient)."""
    return compile_gradient(make_module(max_unit, **options), chunk_tokens=2, chunk_items=5)


@pytest.mark.parametrize('max_unit', [1, 3])
def test_the_loss_is_that_of_the_last_column(max_unit):
    params = make_params(max_unit)
    (total, count), gradient = graded(max_unit)(params, BATCH, new_key(0))
    score_BV = scores(max_unit, params, HISTORIES)
    expected = 0.0
    for score_V, target, weight in zip(score_BV, BATCH.targets_BL[:, -1], BATCH.weights_BL[:, -1]):
        if weight:
            total_V = math.log(sum(math.exp(score) for score in score_V))
            expected += weight * (total_V - score_V[target - 1])
    assert_close(total, expected)
    assert count == 5.5
    slopes = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x: abs(x).max(), gradient))
    idle = {path[-1].key for path, slope in slopes if not slope > 1e-6}
    # A node's own share in its logits falls out of the softmax, but for the kink of the leaky ReLU.
    assert idle <= {'target'}
    assert not np.any(gradient['item_table'][0])


@pytest.mark.slow
def test_the_gradient_is_the_slope_of_the_loss():
    """Along a random direction, by central differences: the level's log Z has its share in it."""
    params = make_params(3)
    _, gradient = graded(3)(params, BATCH, new_key(0))
    direction = random_tree(params, seed=5)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))

    def at(step):
        moved = jax.tree.map(lambda p, d: p + step * d, params, direction)
        return float(graded(3)(moved, BATCH, new_key(0))[0][0])

    assert_close((at(1e-3) - at(-1e-3)) / 2e-3, slope, 5e-3)


def test_rows_without_a_weight_change_no_loss_and_no_gradient():
    """Padding alone, or a history in its place whose target does not count."""
    params = make_params(3)
    (total, count), gradient = graded(3)(params, BATCH, new_key(0))
    other = BATCH._replace(tokens_BL=BATCH.tokens_BL.copy(), segments_BL=BATCH.segments_BL.copy())
    other.tokens_BL[-1], other.segments_BL[-1] = 4, 1
    (other_total, other_count), other_gradient = graded(3)(params, other, new_key(0))
    assert_close(total, other_total)
    assert count == other_count
    jax.tree.map(assert_close, gradient, other_gradient)


def test_one_level_is_plain_cross_entropy():
    params = make_params(1)
    query_BQD, item_VD, _ = encoder(1)(params, *rows_of(HISTORIES))
    assert query_BQD.shape == (len(HISTORIES), 1, D) and item_VD.shape == (V + 1, D)
    target_B, weight_B = BATCH.targets_BL[:, -1], BATCH.weights_BL[:, -1]
    plain = quick_jit(losses.cross_entropy)(query_BQD[:, 0], item_VD, target_B, weight_B)
    (total, count), _ = graded(1)(params, BATCH, new_key(0))
    assert_close(total, plain[0])
    assert count == plain[1]
    assert 'level_logit' not in params


@pytest.mark.slow
def test_training_drops_out():
    module = make_module(1, dropout=0.5)
    f = compile_objective(module)
    one, again, other = (float(f(make_params(1), BATCH, new_key(seed))[0]) for seed in (0, 0, 1))
    assert one == again != other


def test_levels_start_as_the_authors():
    logit_G = msgifsr.level_init(None, (3,))
    assert logit_G.tolist() == [1, 0, 0]


@pytest.mark.slow
def test_bfloat16_keeps_the_column_in_float32():
    """So that the probabilities still sum to one: -log Z would lose its third digit."""
    options = {'dtype': jnp.bfloat16, 'num_blocks': 0}
    query_BQD, item_VD, _ = encoder(2, **options)(make_params(2), *rows_of(HISTORIES))
    assert query_BQD.dtype == np.float32 and item_VD.dtype == jnp.bfloat16
    score_BQV = np.einsum('BQD,VD->BQV', float64(query_BQD), float64(item_VD)[1:])
    assert_close(np.exp(score_BQV).sum(axis=(1, 2)), np.ones(len(HISTORIES)), 1e-4)
