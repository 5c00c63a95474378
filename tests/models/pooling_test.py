"""The models without layers against explicit loops; their dependencies, packing and size."""

from functools import partial

import numpy as np
import pytest
from fixtures import (
    ALONE,
    assert_close,
    assert_depends_on_prefix_alone,
    assert_packing_changes_nothing,
    count_parameters,
    dependencies,
    encode,
    float64,
    make_batch,
    make_model,
    new_key,
    rows,
)
from oracles import comparable_loop

from fame_jax.models.pooling import HistoryMean, LastItem

NAMES = ['last_item', 'history_mean']
COSINE = {'similarity': 'cosine', 'temperature': 0.5}


def pooled_loop(name, table_VD, tokens_L, segments_L, i):
    """The pooled vector of position i, one entry at a time."""
    prefix = [j for j in range(i + 1) if segments_L[j] == segments_L[i]]
    chosen = prefix if name == 'history_mean' else prefix[-1:]
    pooled_D = np.zeros(table_VD.shape[1])
    for d in range(len(pooled_D)):
        for j in chosen:
            pooled_D[d] += table_VD[tokens_L[j], d] / len(chosen)
    return pooled_D


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('length, options', [(1, {}), (2, COSINE), (5, {'similarity': 'dot'})])
def test_matches_the_loop(name, length, options):
    module, params = make_model(name, **options)
    fields = rows(length)
    query_BLD, out = encode(module, params, *fields)
    table_VD = float64(params)['item_table']
    for b, (tokens_L, _, segments_L) in enumerate(zip(*fields)):
        for i in np.flatnonzero(segments_L):
            pooled_D = pooled_loop(name, table_VD, tokens_L, segments_L, i)
            assert_close(out['pool']['pooled_BQD'][b, i], pooled_D)
            expected_D = comparable_loop(pooled_D, module.similarity, module.temperature)
            assert_close(query_BLD[b, i], expected_D)


def test_a_mean_by_hand():
    """Item v has the vector (v, v^2); the histories are 1 2 6 and 4, then padding."""
    module = HistoryMean(num_items=6, width=2, similarity='dot', dropout=0.0)
    item_V = np.arange(7, dtype=np.float32)
    params = {'item_table': np.stack([item_V, item_V**2], axis=1)}
    tokens_BL, segments_BL = np.array([[1, 2, 6, 4, 0]]), np.array([[1, 1, 1, 2, 0]])
    query_BLD, _ = encode(module, params, tokens_BL, 0 * tokens_BL, segments_BL)
    assert_close(query_BLD[0], [[1, 1], [3 / 2, 5 / 2], [9 / 3, 41 / 3], [4, 16], [0, 0]])


def test_the_mean_of_a_history_is_that_of_its_prefix_alone():
    assert_depends_on_prefix_alone(*make_model('history_mean'))


def test_the_last_item_is_the_only_one():
    fields = rows(5)
    depends_BLV = dependencies(*make_model('last_item', similarity='dot'), *fields)
    for tokens_L, depends_LV in zip(fields[0], depends_BLV):
        for token, depends_V in zip(tokens_L, depends_LV):
            assert np.flatnonzero(depends_V).tolist() == [token]


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('similarity', ['dot', 'cosine'])
def test_packing_changes_neither_loss_nor_gradients(name, similarity):
    module, params = make_model(name, similarity=similarity)
    assert_packing_changes_nothing(module, params, idle=set())


@pytest.mark.parametrize('name', NAMES)
def test_the_last_column_alone_of_rows_that_begin_with_padding(name):
    module, params = make_model(name)
    fields = make_batch(ALONE)[:3]
    ends = [3, 1, 0]
    shifted = [np.array([np.roll(row, 7 - i) for row, i in zip(x_BL, ends)]) for x_BL in fields]
    full_BLD, _ = encode(module, params, *fields)
    last_B1D, _ = encode(module, params, *shifted, last=True)
    assert last_B1D.shape == (3, 1, 8)
    for b, i in enumerate(ends):
        assert_close(last_B1D[b, 0], full_BLD[b, i])


@pytest.mark.parametrize('cls', [LastItem, HistoryMean])
def test_the_item_table_is_all(cls):
    assert count_parameters(cls(num_items=12, width=8)) == 13 * 8


@pytest.mark.parametrize('name', NAMES)
def test_dropping_everything_leaves_zeros(name):
    module, params = make_model(name, dropout=1.0)
    encode_dropped = partial(encode, train=True, rngs={'dropout': new_key(0)})
    query_BLD, _ = encode_dropped(module, params, *rows(5))
    assert not np.any(query_BLD)
