"""TV-Rec against explicit float64 loops and a graph filter on a cycle; its two forms."""

from functools import partial

import jax
import numpy as np
import pytest
from fixtures import (
    assert_close,
    assert_depends_on_prefix_alone,
    assert_packing_changes_nothing,
    compile_gradient,
    compile_objective,
    count_parameters,
    dependencies,
    encode,
    float64,
    make_model,
    new_key,
    quick_jit,
    rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from model_checks import right_aligned
from oracles import comparable_loop, gelu_loop, norm_loop, softmax_loop

from fame_jax.batch import Batch
from fame_jax.models import registry, tvrec

make_causal = partial(make_model, 'causal_tvrec', num_filters=3)
make_whole = partial(make_model, 'tvrec', num_filters=3)

HISTORIES = [[1, 2, 3, 2], [4], [5, 6], [7, 8, 9, 10, 11, 12]]


# The equations, a position, a distance and a filter at a time.


def filter_loop(p, place):
    """The filter of a place: its weight at each distance."""
    mixture_M = p['mixture'][min(place, len(p['mixture']) - 1)]
    filter_S = np.zeros(p['basis'].shape[1])
    for weight, basis_S in zip(mixture_M, p['basis'], strict=True):
        filter_S += weight * basis_S / np.sqrt(sum(basis_S**2))
    return filter_S


def mix_loop(x_LD, p, module):
    """The filtered vectors of one history, [L, D]."""
    mixed_LD = np.zeros(x_LD.shape)
    for t in range(len(x_LD)):
        place = t if module.causal else len(x_LD) - 1 - t
        for k in range(t + 1):
            mixed_LD[t] += filter_loop(p, place)[k] * x_LD[t - k]
    return mixed_LD


def history_loop(items, p, module):
    """The last block's output of one history, [L, D]."""
    x_LD = np.array([norm_loop(p['item_table'][item], p['input_norm']) for item in items])
    for n in range(module.num_blocks):
        block, out_LD = p[f'block_{n}'], []
        up, down = block['feed_forward']['up'], block['feed_forward']['down']
        for x_D, mixed_D in zip(x_LD, mix_loop(x_LD, block, module)):
            h_D = norm_loop(x_D + mixed_D, block['filter_norm'])
            inner = gelu_loop(h_D @ up['kernel'] + up['bias'])
            h_D = h_D + inner @ down['kernel'] + down['bias']
            out_LD.append(norm_loop(h_D, block['feed_forward_norm']))
        x_LD = np.array(out_LD)
    return np.array([comparable_loop(x_D, module.similarity, module.temperature) for x_D in x_LD])


@pytest.mark.parametrize(
    'length, options',
    [
        (1, {}),
        (5, {'num_blocks': 2}),
        (5, {'time_variant': False, 'num_filters': 1}),
        (5, {'similarity': 'cosine', 'max_length': 5, 'num_filters': 7}),
    ],
)
def test_the_causal_form_matches_the_loop(length, options):
    module, params = make_causal(**options)
    tokens_BL, positions_BL, segments_BL = fields = rows(length)
    query_BLD, parts = encode(module, params, *fields)
    p = float64(params)
    for b, i in np.argwhere(segments_BL > 0):
        start = i - positions_BL[b, i]
        expected_D = history_loop(tokens_BL[b, start : i + 1], p, module)[-1]
        assert_close(query_BLD[b, i], expected_D, 2e-5)
        filter_S = parts['block_0']['filter_BQS'][b, i]
        weight_S = filter_loop(p['block_0'], positions_BL[b, i])
        assert_close(filter_S[start : i + 1], weight_S[: i - start + 1][::-1])
        assert not filter_S[:start].any() and not filter_S[i + 1 :].any()


@pytest.mark.parametrize(
    'width, options',
    [
        (6, {}),
        (6, {'num_blocks': 3}),
        (9, {'num_blocks': 2, 'max_length': 7, 'similarity': 'cosine'}),
        (6, {'num_blocks': 2, 'time_variant': False}),
    ],
)
def test_the_authors_form_matches_the_loop(width, options):
    module, params = make_whole(**options)
    query_B1D, _ = encode(module, params, *right_aligned(HISTORIES, width))
    p = float64(params)
    for items, query_1D in zip(HISTORIES, query_B1D, strict=True):
        assert_close(query_1D, history_loop(items, p, module)[-1:], 2e-5)


def test_the_filter_is_the_authors_graph_filter():
    """Powers of the adjacency matrix of a directed cycle of 2N nodes, N of them zeros."""
    module, params = make_whole()
    block, size = float64(params)['block_0'], module.max_length
    x_LD = np.random.default_rng(0).normal(size=(size, 2))
    cycle = np.zeros((2 * size, 2 * size))
    for node in range(2 * size):
        cycle[(node + 1) % (2 * size), node] = 1
    shifted = np.concatenate([x_LD, np.zeros((size, 2))])
    filtered = np.zeros((size, 2))
    for k in range(size):
        for column in range(size):
            weight = filter_loop(block, size - 1 - column)[k]
            filtered[column] += weight * shifted[column]
        shifted = cycle @ shifted
    assert_close(mix_loop(x_LD, block, module), filtered)


# The filters of positions.


def test_filters_by_place_and_distance():
    filter_LS = np.array([[1, 2, 3], [10, 20, 30]], np.float32)  # two places, three distances
    select = quick_jit(tvrec.select_filters, static_argnums=2)
    weight_BQS = select(filter_LS, np.array([[0, 1, 0], [1, 0, 7]]), 3)
    assert np.tril(weight_BQS).tolist() == [
        [[1, 0, 0], [20, 10, 0], [3, 2, 1]],
        [[10, 0, 0], [2, 1, 0], [30, 20, 10]],
    ]
    assert select(filter_LS, np.array([[1]]), 3).tolist() == [[[30, 20, 10]]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_the_forms_are_equal_with_one_filter_for_all_places(items):
    options = {'time_variant': False, 'num_blocks': 2}
    (whole, params), (causal, _) = make_whole(**options), make_causal(**options)
    fields = right_aligned([items], 6)
    query_1D = encode(whole, params, *fields)[0][0]
    assert_close(query_1D, encode(causal, params, *fields, last=True)[0][0])


def test_the_forms_differ_with_filters_by_place():
    (whole, params), (causal, _) = make_whole(), make_causal()
    fields = right_aligned([[1, 2, 3]], 3)
    query_1D = encode(whole, params, *fields)[0][0]
    assert np.abs(query_1D - encode(causal, params, *fields, last=True)[0][0]).max() > 1e-3


def test_the_length_of_a_filter_of_the_basis_has_no_effect():
    module, params = make_causal()
    block = params['block_0']
    longer = params | {'block_0': block | {'basis': 3 * block['basis']}}
    fields = rows(5)
    assert_close(encode(module, longer, *fields)[0], encode(module, params, *fields)[0])


def test_a_causal_query_depends_on_its_own_prefix_alone():
    assert_depends_on_prefix_alone(*make_causal(num_blocks=2))


def test_a_query_of_a_row_depends_on_the_whole_prefix():
    module, params = make_whole(num_blocks=2)
    depends_BLV = dependencies(module, params, *right_aligned([[6, 7, 8], [9]], 6))
    assert [np.flatnonzero(depends_V).tolist() for depends_V in depends_BLV[:, 0]] == [
        [6, 7, 8],
        [9],
    ]


@pytest.mark.slow
def test_packing_changes_neither_loss_nor_gradients():
    assert_packing_changes_nothing(*make_causal(), idle=set())


@pytest.mark.slow
def test_the_last_column_alone():
    module, params = make_causal(num_blocks=2)
    fields = rows(5)
    full_BLD, full = encode(module, params, *fields)
    last_B1D, last = encode(module, params, *fields, last=True)
    assert_close(last_B1D, full_BLD[:, -1:])
    for block, queries in (('block_0', slice(None)), ('block_1', slice(-1, None))):
        filter_BQS = full[block]['filter_BQS'][:, queries]
        assert_close(last[block]['filter_BQS'], filter_BQS)


# The loss, the penalty and the parameters.


def make_batch(targets):
    """A row for each history, with its target in the last column."""
    target_BL, weight_BL = np.zeros((4, 6), np.int32), np.zeros((4, 6), np.float32)
    target_BL[:, -1], weight_BL[:, -1] = targets, np.array(targets) > 0
    return Batch(*right_aligned(HISTORIES, 6), target_BL, weight_BL)


def test_the_loss_is_that_of_each_rows_target():
    module, params = make_whole()
    targets = [5, 6, 0, 12]  # the third row does not count
    (total, count), gradient = compile_gradient(module)(params, make_batch(targets), new_key(0))
    expected, p = 0.0, float64(params)
    for items, target in zip(HISTORIES, targets):
        query_D = history_loop(items, p, module)[-1]
        if target:
            expected -= np.log(softmax_loop(p['item_table'][1:] @ query_D)[target - 1])
    assert_close([total, count], [expected, 3])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not gradient['item_table'][0].any()


def test_filters_are_orthogonal_or_not():
    penalty = quick_jit(tvrec.orthogonality)
    for rows_MS, expected in (
        ([[2, 0, 0], [0, -3, 0]], 0),
        ([[1, 0], [5, 0]], 2),  # a product of 1 and one of 1, both should be 0
        ([[1, 1], [0, 1]], 2 * (1 / 2)),  # cos(45 degrees), squared
    ):
        assert_close(penalty(np.array(rows_MS, np.float32)), expected)


def test_the_objective_adds_the_penalty_of_every_block():
    batch, options = make_batch([5, 6, 0, 12]), {'num_blocks': 2}
    plain, params = make_whole(**options)
    total, weight, metrics = compile_objective(plain)(params, batch, new_key(0))
    assert metrics == {}
    module, _ = make_whole(orthogonality_weight=0.5, **options)
    other, _, metrics = compile_objective(module)(params, batch, new_key(0))
    expected = 0.0
    for block in ('block_0', 'block_1'):
        basis_MS = [b_S / np.sqrt(sum(b_S**2)) for b_S in float64(params)[block]['basis']]
        for m, one_S in enumerate(basis_MS):
            for n, other_S in enumerate(basis_MS):
                expected += (sum(one_S * other_S) - (m == n)) ** 2
    assert_close(metrics['orthogonality'], expected)
    assert_close((other - total) / weight, 0.5 * expected)


def test_number_of_parameters():
    items, norm = 13 * 8, 8 + 8
    feed_forward = (8 * 32 + 32) + (32 * 8 + 8)
    basis, mixture = 3 * 6, 6 * 3
    total = items + norm + basis + mixture + norm + feed_forward + norm
    for make in (make_causal, make_whole):
        assert count_parameters(make()[0]) == total
        assert count_parameters(make(time_variant=False)[0]) == total - 5 * 3


def test_filters_start_as_the_authors():
    module, _ = make_whole(max_length=50, num_filters=32)
    block = registry.init_params(module, new_key(0))['block_0']
    for name, shape in (('mixture', (50, 32)), ('basis', (32, 50))):
        assert block[name].shape == shape
        assert abs(block[name].std() / 1e-3 - 1) < 0.1


def test_dropping_everything_forgets_the_history():
    module, params = make_causal(dropout=1.0)
    query_BLD, _ = encode(module, params, *rows(5), train=True, rngs={'dropout': new_key(0)})
    block = float64(params)['block_0']
    expected_D = norm_loop(block['filter_norm']['bias'], block['feed_forward_norm'])
    assert_close(query_BLD, np.broadcast_to(expected_D, query_BLD.shape))
