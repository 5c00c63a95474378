"""BSARec against explicit float64 loops, with a Fourier transform by its definition; both forms."""

import cmath
from functools import partial

import jax
import numpy as np
import pytest
from fixtures import (
    assert_close,
    assert_depends_on_prefix_alone,
    assert_packing_changes_nothing,
    compile_gradient,
    count_parameters,
    dependencies,
    encode,
    float64,
    make_model,
    new_key,
    rows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from model_checks import right_aligned
from oracles import attention_loop, comparable_loop, gelu_loop, norm_loop, softmax_loop

from fame_jax.batch import Batch
from fame_jax.models import bsarec, registry

make_causal = partial(make_model, 'causal_bsarec', cutoff=3)
make_whole = partial(make_model, 'bsarec', cutoff=3)

HISTORIES = [[1, 2, 3, 2], [4], [5, 6], [7, 8, 9, 10, 11, 12]]


# The equations, a frequency, a position and an item at a time.


def low_pass_loop(x_ND, cutoff):
    """The frequencies |k| <= cutoff // 2 of a row's columns, by the definition of the transform."""
    length, low_ND = len(x_ND), np.zeros(x_ND.shape)
    for k in range(length):
        if min(k, length - k) > cutoff // 2:  # frequency k is frequency k - N
            continue
        turns = [cmath.exp(-2j * cmath.pi * k * n / length) for n in range(length)]
        coefficient_D = sum(turn * x_D for turn, x_D in zip(turns, x_ND))
        for n in range(length):
            low_ND[n] += (coefficient_D * turns[n].conjugate()).real / length
    return low_ND


def low_of_history_loop(x_LD, module):
    """The low-pass part of each item's vector, in rows of N columns that end with the history."""

    def low_of_row(x_LD):
        zeros_ND = np.zeros((module.max_length - len(x_LD), x_LD.shape[1]))
        return low_pass_loop(np.concatenate([zeros_ND, x_LD]), module.cutoff)[-len(x_LD) :]

    if not module.causal:
        return low_of_row(x_LD)
    return np.array([low_of_row(x_LD[: i + 1])[-1] for i in range(len(x_LD))])


def block_loop(x_LD, p, module):
    """One block of one history, [L, D]."""
    attended_LD, _ = attention_loop(x_LD, [1] * len(x_LD), p['attention'], 'head')
    low_LD = low_of_history_loop(x_LD, module)
    up, down = p['feed_forward']['up'], p['feed_forward']['down']
    out_LD = []
    for x_D, attended_D, low_D in zip(x_LD, attended_LD, low_LD):
        a_D = norm_loop(x_D + attended_D, p['attention_norm'])
        f_D = norm_loop(x_D + low_D + p['root_beta'] ** 2 * (x_D - low_D), p['filter_norm'])
        h_D = module.filter_share * f_D + (1 - module.filter_share) * a_D
        inner = gelu_loop(h_D @ up['kernel'] + up['bias'])
        out_LD.append(
            norm_loop(h_D + inner @ down['kernel'] + down['bias'], p['feed_forward_norm'])
        )
    return np.array(out_LD)


def history_loop(items, p, module):
    """The last block's output of one history, [L, D]."""
    place = {
        'relative': lambda i: 0,
        'start': lambda i: p['position_table'][i],
        'end': lambda i: p['position_table'][len(items) - 1 - i],
    }[module.positions]
    x_LD = [norm_loop(p['item_table'][v] + place(i), p['input_norm']) for i, v in enumerate(items)]
    x_LD = np.array(x_LD)
    for n in range(module.num_blocks):
        x_LD = block_loop(x_LD, p[f'block_{n}'], module)
    return np.array([comparable_loop(x_D, module.similarity, module.temperature) for x_D in x_LD])


@pytest.mark.parametrize(
    'length, options',
    [
        (1, {}),
        (5, {'num_blocks': 2, 'cutoff': 4}),
        (5, {'positions': 'start', 'filter_share': 0.4, 'num_heads': 1}),
        (5, {'similarity': 'cosine', 'cutoff': 1, 'max_length': 5}),
    ],
)
def test_the_causal_form_matches_the_loop(length, options):
    module, params = make_causal(**options)
    tokens_BL, positions_BL, segments_BL = fields = rows(length)
    query_BLD, _ = encode(module, params, *fields)
    p = float64(params)
    for b, i in np.argwhere(segments_BL > 0):
        items = tokens_BL[b, i - positions_BL[b, i] : i + 1]
        assert_close(query_BLD[b, i], history_loop(items, p, module)[-1], 2e-5)


@pytest.mark.parametrize(
    'width, options',
    [
        (6, {}),
        (6, {'num_blocks': 2, 'cutoff': 4}),
        (8, {'num_blocks': 3, 'max_length': 7, 'filter_share': 1.0}),
        (6, {'num_blocks': 2, 'positions': 'relative', 'similarity': 'cosine'}),
    ],
)
def test_the_authors_form_matches_the_loop(width, options):
    module, params = make_whole(**options)
    query_B1D, parts = encode(module, params, *right_aligned(HISTORIES, width))
    p = float64(params)
    for items, query_1D in zip(HISTORIES, query_B1D, strict=True):
        assert_close(query_1D, history_loop(items, p, module)[-1:], 2e-5)
    assert parts[f'block_{module.num_blocks - 1}']['low_BQD'].shape == (4, 1, 8)


# The filter.


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_the_matrix_is_the_filter(period, cutoff, seed):
    x_ND = np.random.default_rng(seed).normal(size=(period, 2))
    matrix_NN = bsarec.low_pass_matrix(period, period, cutoff)
    assert_close(matrix_NN @ x_ND, low_pass_loop(x_ND, cutoff))


def test_the_filter_by_hand():
    """Of four columns: their mean; what is not alternating; everything."""
    mean, slow, all_of_it = (bsarec.low_pass_matrix(4, 4, cutoff) for cutoff in (1, 2, 4))
    assert_close(mean, np.full((4, 4), 1 / 4))
    alternating_44 = np.array([[(-1) ** (i + j) for j in range(4)] for i in range(4)]) / 4
    assert_close(slow, np.eye(4) - alternating_44)
    assert_close(all_of_it, np.eye(4))


def test_a_shorter_row_begins_with_zeros():
    assert_close(bsarec.low_pass_matrix(3, 7, 5), bsarec.low_pass_matrix(7, 7, 5)[4:, 4:])


def test_without_the_filter_it_is_sasrec():
    module, params = make_causal(filter_share=0.0, num_blocks=2)
    sasrec, other = make_model('sasrec', similarity='dot', num_blocks=2)
    parts = ('attention', 'attention_norm', 'feed_forward', 'feed_forward_norm')
    shared = {name: params[name] for name in other if not name.startswith('block_')}
    for block in ('block_0', 'block_1'):
        shared[block] = {part: params[block][part] for part in parts}
    assert jax.tree.structure(shared) == jax.tree.structure(other)
    fields = rows(5)
    assert_close(encode(module, params, *fields)[0], encode(sasrec, shared, *fields)[0])


# The two forms.


@pytest.mark.parametrize('num_blocks, equal', [(1, True), (2, False)])
def test_the_forms_are_equal_with_one_block(num_blocks, equal):
    options = {'num_blocks': num_blocks, 'positions': 'relative'}
    (whole, params), (causal, _) = make_whole(**options), make_causal(**options)
    fields = right_aligned(HISTORIES, 6)
    one, other = (encode(m, params, *fields, last=True)[0] for m in (whole, causal))
    assert np.allclose(one, other, atol=1e-5) == equal
    assert_close(one[1], other[1])  # of one item there is nothing later


def test_the_authors_form_lets_lower_blocks_read_later_items():
    """The low-pass part of the first item depends on the last one; the causal form's does not."""
    fields = right_aligned([[1, 2, 3]], 3)
    for make, depends in ((make_whole, True), (make_causal, False)):
        module, params = make(num_blocks=2, max_length=8)  # g(2) = (1 + 2 cos(pi / 2)) / 8
        low = []
        for last in (3, 4):
            fields[0][0, -1] = last
            low.append(encode(module, params, *fields)[1]['block_0']['low_BQD'][0, 0])
        assert (np.abs(low[0] - low[1]).max() > 1e-3) == depends


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
    assert_packing_changes_nothing(*make_causal(), idle={'block_0/attention/key_bias'})


@pytest.mark.slow
def test_the_last_column_alone():
    module, params = make_causal(num_blocks=2)
    fields = rows(5)
    full_BLD, _ = encode(module, params, *fields)
    assert_close(encode(module, params, *fields, last=True)[0], full_BLD[:, -1:])


# The loss, the parameters and the recipe.


def test_the_loss_is_that_of_each_rows_target():
    module, params = make_whole()
    targets = [5, 6, 0, 12]  # the third row does not count
    target_BL, weight_BL = np.zeros((4, 6), np.int32), np.zeros((4, 6), np.float32)
    target_BL[:, -1], weight_BL[:, -1] = targets, np.array(targets) > 0
    batch = Batch(*right_aligned(HISTORIES, 6), target_BL, weight_BL)
    (total, count), gradient = compile_gradient(module)(params, batch, new_key(0))
    expected, p = 0.0, float64(params)
    for items, target in zip(HISTORIES, targets):
        query_D = history_loop(items, p, module)[-1]
        if target:
            expected -= np.log(softmax_loop(p['item_table'][1:] @ query_D)[target - 1])
    assert_close([total, count], [expected, 3])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not gradient['item_table'][0].any()
    assert gradient['block_0']['root_beta'].all()


@pytest.mark.parametrize('make, positions', [(make_causal, 'relative'), (make_whole, 'end')])
def test_number_of_parameters(make, positions):
    module, _ = make()
    sasrec, _ = make_model('sasrec', positions='start' if positions == 'end' else positions)
    filter_and_norm = 8 + (8 + 8)
    assert module.positions == positions
    assert count_parameters(module) == count_parameters(sasrec) + filter_and_norm


def test_the_filters_weight_starts_as_the_authors():
    module, _ = make_whole(width=256)
    root_D = registry.init_params(module, new_key(0))['block_0']['root_beta']
    error = 1 / np.sqrt(len(root_D))
    assert abs(root_D.mean()) < 3 * error and abs(root_D.std() - 1) < 3 * error


def test_dropping_everything_forgets_the_history():
    module, params = make_causal(dropout=1.0)
    query_BLD, _ = encode(module, params, *rows(5), train=True, rngs={'dropout': new_key(0)})
    block = float64(params)['block_0']
    parts = [block[name]['bias'] for name in ('filter_norm', 'attention_norm')]
    h_D = module.filter_share * parts[0] + (1 - module.filter_share) * parts[1]
    expected_D = norm_loop(h_D, block['feed_forward_norm'])
    assert_close(query_BLD, np.broadcast_to(expected_D, query_BLD.shape))
