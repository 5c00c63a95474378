"""GRU4Rec against explicit float64 loops; where its state is reset, its dependencies and size."""

import math
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
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import comparable_loop

from fame_jax.models import gru4rec, registry

make_gru = partial(make_model, 'gru4rec', hidden_width=6)


def sigmoid_loop(x):
    return 1 / (1 + math.exp(-x))


def step_loop(input_J, state_G, kernel_GJ):
    """One step of a GRU, a unit at a time; r, z and n side by side in the columns."""
    size = len(state_G)
    after_G = np.zeros(size)
    for g in range(size):
        from_state = [sum(state_G * kernel_GJ[:, gate * size + g]) for gate in range(3)]
        r = sigmoid_loop(input_J[g] + from_state[0])
        z = sigmoid_loop(input_J[size + g] + from_state[1])
        n = math.tanh(input_J[2 * size + g] + r * from_state[2])
        after_G[g] = (1 - z) * n + z * state_G[g]
    return after_G


def states_loop(input_LJ, kernel_GJ, segments_L):
    """The states of one row, each history from zeros."""
    state_LG = np.zeros((len(input_LJ), len(kernel_GJ)))
    for i in range(len(input_LJ)):
        goes_on = i > 0 and segments_L[i] == segments_L[i - 1]
        before_G = state_LG[i - 1] if goes_on else np.zeros(len(kernel_GJ))
        state_LG[i] = step_loop(input_LJ[i], before_G, kernel_GJ)
    return state_LG


CASES = [
    (1, {}),
    (2, {'similarity': 'cosine', 'temperature': 0.5, 'hidden_width': 1}),
    (5, {}),
    (5, {'similarity': 'cosine', 'hidden_width': 9}),
]


@pytest.mark.parametrize('length, options', CASES)
def test_matches_the_loop(length, options):
    module, params = make_gru(**options)
    fields = rows(length)
    query_BLD, out = encode(module, params, *fields)
    p = float64(params)
    for b, (tokens_L, _, segments_L) in enumerate(zip(*fields)):
        input_LJ = np.array([p['item_table'][token] @ p['input_kernel'] for token in tokens_L])
        state_LG = states_loop(input_LJ, p['state_kernel'], segments_L)
        assert_close(out['gru']['state_BLG'][b], state_LG)
        for query_D, state_G in zip(query_BLD[b], state_LG, strict=True):
            affine_D = state_G @ p['output']['kernel'] + p['output']['bias']
            expected_D = comparable_loop(affine_D, module.similarity, module.temperature)
            assert_close(query_D, expected_D)


def test_one_unit_by_hand():
    """All inputs 0 but the candidate's, no recurrent product: halfway from h to tanh(1)."""
    input_BLJ = np.broadcast_to(np.array([0, 0, 1], np.float32), (1, 4, 3))
    same_BL = np.array([[False, True, True, False]])
    state_BLG = quick_jit(gru4rec.recur)(input_BLJ, np.zeros((1, 3), np.float32), same_BL)
    assert_close(state_BLG[0, :, 0], np.tanh(1) * np.array([1 / 2, 3 / 4, 7 / 8, 1 / 2]))


def test_the_state_is_reset_between_histories():
    segments_BL = [[1, 1, 2, 3, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 2]]
    expected_BL = [[0, 1, 0, 0, 1, 0, 1], [0, 1, 0, 1, 1, 1, 1], [0, 1, 0, 1, 1, 1, 0]]
    assert gru4rec.same_history(jnp.array(segments_BL)).astype(int).tolist() == expected_BL


recur_jit = quick_jit(
    lambda input_BLJ, kernel_GJ, segments_BL: gru4rec.recur(
        input_BLJ, kernel_GJ, gru4rec.same_history(segments_BL)
    )
)


@settings(max_examples=25, deadline=None)
@given(border_L=st.lists(st.booleans(), min_size=7, max_size=7), padding=st.integers(0, 7))
def test_states_do_not_depend_on_other_histories(border_L, padding):
    """Whatever the borders, a history's states are those of a row that begins with it."""
    rng = np.random.default_rng(0)
    input_BLJ = rng.normal(size=(1, 7, 12)).astype(np.float32)
    kernel_GJ = rng.normal(size=(4, 12)).astype(np.float32)
    segments_L = 1 + np.cumsum(border_L, dtype=np.int32)
    segments_L[:padding] = 0
    state_LG = recur_jit(input_BLJ, kernel_GJ, segments_L[None])[0]
    for segment in np.unique(segments_L):
        places = np.flatnonzero(segments_L == segment)
        alone_LJ = float64(input_BLJ)[0, places]
        ones_L = np.ones(len(places))
        assert_close(state_LG[places], states_loop(alone_LJ, float64(kernel_GJ), ones_L))


@pytest.mark.slow
def test_a_query_depends_on_its_own_prefix_alone():
    assert_depends_on_prefix_alone(*make_gru())


@pytest.mark.slow
@pytest.mark.parametrize('similarity', ['dot', 'cosine'])
def test_packing_changes_neither_loss_nor_gradients(similarity):
    assert_packing_changes_nothing(*make_gru(similarity=similarity), idle=set())


def test_the_last_column_alone_of_rows_that_begin_with_padding():
    module, params = make_gru()
    fields = make_batch(ALONE)[:3]
    ends = [3, 1, 0]
    shifted = [np.array([np.roll(row, 7 - i) for row, i in zip(x_BL, ends)]) for x_BL in fields]
    full_BLD, full = encode(module, params, *fields)
    last_B1D, last = encode(module, params, *shifted, last=True)
    assert last_B1D.shape == (3, 1, 8)
    for b, i in enumerate(ends):
        assert_close(last_B1D[b, 0], full_BLD[b, i], 1e-6)
        state_G = full['gru']['state_BLG'][b, i]
        assert_close(last['gru']['state_BLG'][b, 0], state_G, 1e-6)


def test_number_of_parameters():
    _, params = make_gru(hidden_width=5)
    items, gates, output = 13 * 8, 3 * 5 * (8 + 5), 5 * 8 + 8
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == items + gates + output


def test_parameters_start_as_in_recbole():
    module, _ = make_gru(width=64, hidden_width=128)
    p = jax.device_get(registry.init_params(module, new_key(0)))
    bounds = {
        'input_kernel': math.sqrt(6 / (64 + 3 * 128)),
        'state_kernel': math.sqrt(6 / (128 + 3 * 128)),
        'output': math.sqrt(1 / 128),
    }
    for name, bound in bounds.items():
        kernel = p[name]['kernel'] if name == 'output' else p[name]
        assert 0.99 * bound < np.abs(kernel).max() <= bound
        assert abs(kernel.std() / bound - math.sqrt(1 / 3)) < 0.01
    assert not np.any(p['output']['bias'])


def test_dropping_everything_leaves_the_bias():
    module, params = make_gru(dropout=1.0)
    rngs = {'dropout': new_key(0)}
    query_BLD, _ = encode(module, params, *rows(5), train=True, rngs=rngs)
    assert_close(query_BLD, np.broadcast_to(params['output']['bias'], query_BLD.shape))
