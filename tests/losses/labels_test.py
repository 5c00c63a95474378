"""Soft labels and the weight of seen items: each against a loop over positions of packed rows."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_fixtures import real_file
from fixtures import assert_all_close, make_loss_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from oracles import cross_entropy_loop, soft_cross_entropy_loop

from fame_jax import losses
from fame_jax.data import epochs, windows
from fame_jax.data.prepare import prepare
from fame_jax.losses.labels import future_targets, log_seen
from fame_jax.parallel.mesh import DATA, MODEL

SHARES = 1.0, 0.3, 0.1
SIZES = [(0, 0), (3, 0), (5, 4), (0, 1), (5000, 5000)]


def pack(histories, length):
    """Rows of packed histories, one row: tokens, segments and targets [1, L]."""
    token, segment, target = ([0] * length for _ in range(3))
    column = 0
    for number, history in enumerate(histories, start=1):
        for item, following in itertools.pairwise(history):
            token[column], segment[column], target[column] = item, number, following
            column += 1
    return [np.array([field], np.int32) for field in (token, segment, target)]


def test_the_next_items_of_packed_histories():
    _, segment_BL, target_BL = pack([[7, 8, 9, 7], [4, 5]], length=6)
    target_BLF, share_BLF = future_targets(target_BL, segment_BL, (1.0, 0.5, 0.25))
    np.testing.assert_array_equal(
        target_BLF[0], [[8, 9, 7], [9, 7, 0], [7, 0, 0], [5, 0, 0], [0, 0, 0], [0, 0, 0]]
    )
    expected = [[4 / 7, 2 / 7, 1 / 7], [2 / 3, 1 / 3, 0], [1, 0, 0], [1, 0, 0], [0] * 3, [0] * 3]
    np.testing.assert_allclose(share_BLF[0], expected, rtol=1e-6)


histories = st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=6), max_size=4)


@settings(max_examples=50, deadline=None)
@given(histories, st.lists(st.floats(0, 2), max_size=5))
def test_labels_are_the_next_items_of_the_same_history(histories, more):
    length = sum(len(history) - 1 for history in histories) + 2
    _, segment_BL, target_BL = pack(histories, length)
    shares = [1.0, *more]
    target_BLF, share_BLF = future_targets(target_BL, segment_BL, shares)
    column = 0
    for history in histories:
        for i in range(len(history) - 1):
            following = history[i + 1 :][: len(shares)]
            filled = following + [0] * (len(shares) - len(following))
            assert target_BLF[0, column].tolist() == filled
            total = sum(shares[: len(following)])
            expected = [share / total for share in shares[: len(following)]]
            expected += [0.0] * (len(shares) - len(following))
            np.testing.assert_allclose(share_BLF[0, column], expected, atol=1e-6)
            column += 1
    assert not np.any(share_BLF[0, column:]) and not np.any(target_BLF[0, column:])


def soft_inputs(tokens, items, futures=3, seed=0):
    """As `make_loss_inputs`, with targets and shares [T, F] and logarithms of extra terms [T]."""
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(tokens, items, seed=seed, scale=2.0)
    rng = np.random.default_rng(seed + 1)
    target_TF = np.stack([target_T] + [rng.integers(0, items + 1, tokens)] * (futures - 1), axis=1)
    share_TF = rng.uniform(size=target_TF.shape) * (target_TF > 0)
    share_TF[:, 0] += 0.5
    share_TF /= share_TF.sum(axis=1, keepdims=True)
    log_extra_T = rng.normal(size=tokens).astype(np.float32)
    log_extra_T[:2] = -1e30
    return query_TD, item_VD, target_TF, weight_T, share_TF.astype(np.float32), log_extra_T


def soft_loss(size, mesh=None, num_items=None):
    """The value, the count and the gradients by queries, items and extra terms; compiled."""
    return _soft_loss(size, mesh, num_items)


@cache
def _soft_loss(size, mesh, num_items):
    loss = partial(
        losses.cross_entropy,
        chunk_tokens=size[0],
        chunk_items=size[1],
        mesh=mesh,
        num_items=num_items,
    )

    def total(query_TD, item_VD, log_extra_T, target_TF, weight_T, share_TF):
        labels = {'share_TF': share_TF, 'log_extra_T': log_extra_T}
        return loss(query_TD, item_VD, target_TF, weight_T, **labels)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))


def run_soft(size, data, **mesh):
    query_TD, item_VD, target_TF, weight_T, share_TF, log_extra_T = map(jnp.asarray, data)
    arrays = query_TD, item_VD, log_extra_T, target_TF, weight_T, share_TF
    (total, count), grads = soft_loss(size, **mesh)(*arrays)
    return total, count, *grads


def with_extra_item(data):
    """The loss whose extra term is the score of an item of its own for each token; a loop."""
    query_TD, item_VD, target_TF, weight_T, share_TF, log_extra_T = data
    T, V = len(query_TD), len(item_VD)
    # Item V + t scores e_t with token t alone: one more column a token, which holds a one.
    wide_query = np.concatenate([query_TD, np.eye(T)], axis=1)
    extra = np.diag(np.maximum(log_extra_T, -1e3).astype(np.float64))
    wide_item = np.block([[item_VD, np.zeros((V, T))], [np.zeros((T, query_TD.shape[1])), extra]])
    factor_TV = np.concatenate([np.ones((T, V)), np.eye(T)], axis=1)
    total, count, d_query, d_item = soft_cross_entropy_loop(
        wide_query, wide_item, target_TF, weight_T, share_TF, factor_TV
    )
    width = query_TD.shape[1]
    d_extra_T = np.diag(d_item[V:, width:])
    return total, count, d_query[:, :width], d_item[:V, :width], d_extra_T


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('tokens, items', [(1, 1), (7, 10), (12, 37)])
def test_soft_labels_and_extra_terms_equal_a_loop_in_float64(size, tokens, items):
    data = soft_inputs(tokens, items)
    assert_all_close(run_soft(size, data), with_extra_item(data))


@pytest.mark.parametrize('size', SIZES[:3])
def test_a_mesh_of_one_device_equals_a_loop_in_float64(size):
    """`parallel/sharded_loss_test.py` runs them on eight."""
    types = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((1, 1), (DATA, MODEL), axis_types=types, devices=jax.devices()[:1])
    data = soft_inputs(12, 37)
    assert_all_close(run_soft(size, data, mesh=mesh, num_items=37), with_extra_item(data))


@pytest.mark.parametrize('size', SIZES)
def test_a_label_of_one_target_is_the_plain_loss(size):
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(12, 37)
    data = query_TD, item_VD, target_T[:, None], weight_T, np.ones((12, 1), np.float32)
    result = run_soft(size, (*data, np.full(12, -1e30, np.float32)))
    assert_all_close(result[:4], cross_entropy_loop(query_TD, item_VD, target_T, weight_T))
    np.testing.assert_array_equal(result[4], np.zeros(12))


@settings(max_examples=15, deadline=None)
@given(histories, st.integers(0, 99))
def test_seen_items_weigh_more_as_negatives(histories, seed):
    """The term added to the sum, against a loop in which a seen item's exp counts three times."""
    length, width, items = 16, 4, 6
    histories = [history for history in histories][:3]
    token_BL, segment_BL, target_BL = pack(histories, length)
    rng = np.random.default_rng(seed)
    query_BLD = rng.normal(size=(1, length, width)).astype(np.float32)
    item_VD = rng.normal(size=(items + 1, width)).astype(np.float32)
    weight_T = (target_BL[0] > 0).astype(np.float32)
    factor_TV, column = np.ones((length, items + 1)), 0
    for history in histories:
        for i in range(len(history) - 1):
            for seen in history[: i + 1]:
                factor_TV[column, seen] = 1 if seen == history[i + 1] else 3
            column += 1
    loop = soft_cross_entropy_loop(
        query_BLD[0], item_VD, target_BL[0][:, None], weight_T, np.ones((length, 1)), factor_TV
    )
    assert_all_close(_seen_loss(query_BLD, item_VD, token_BL, segment_BL, target_BL), loop)


@jax.jit
def _seen_loss(query_BLD, item_VD, token_BL, segment_BL, target_BL):
    def total(query_BLD, item_VD):
        log_extra_BL = log_seen(
            query_BLD, item_VD[token_BL], token_BL, segment_BL, target_BL, 3.0, losses.identity
        )
        query_TD = query_BLD.reshape(-1, query_BLD.shape[-1])
        weight_T = (target_BL > 0).astype(jnp.float32).reshape(-1)
        extra = {'log_extra_T': log_extra_BL.reshape(-1)}
        return losses.cross_entropy(query_TD, item_VD, target_BL.reshape(-1), weight_T, **extra)

    (loss, count), (d_query, d_item) = jax.value_and_grad(total, (0, 1), has_aux=True)(
        query_BLD, item_VD
    )
    return loss, count, d_query[0], d_item


@pytest.mark.slow
def test_no_held_out_item_of_real_data_is_in_a_label():
    """The held-out items of each user have ids of their own, past V; an epoch has none of them."""
    data = prepare('toys', data_dir=str(real_file('toys').parents[1]))
    ends = data.offsets[1:]
    item_ids = data.items.copy()
    for last in (1, 2):
        item_ids[ends - last] = data.num_items + last
    cut = windows.make_windows(item_ids, data.offsets, 50, 'split', data.split.train_ends)
    batches, steps = epochs.epoch_batches(cut, seed=0, epoch=0, row_length=64, rows_per_step=64)
    label, longest = jax.jit(lambda *fields: future_targets(*fields, SHARES)[0]), 0
    for batch in batches:
        target_BLF = np.asarray(label(batch.targets_BL, batch.segments_BL))
        longest = max(longest, np.count_nonzero(target_BLF[..., 2]))
        assert target_BLF.max() <= data.num_items
    assert longest > 0 and steps > 10
