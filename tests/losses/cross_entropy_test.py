"""The cross-entropy's forms on one device, against explicit float64 loops and each other."""

import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import assert_all_close, chunked, make_loss_inputs, value_and_grads
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from oracles import cross_entropy_loop

from fame_jax import losses
from fame_jax.parallel.mesh import DATA, MODEL

FORMS = {
    'no chunks': losses.cross_entropy,
    'chunks of tokens': chunked(3, 0),
    'chunks of both': chunked(5, 4),
}


@pytest.fixture(params=FORMS)
def loss(request):
    """Each form on one device: all at once, in chunks of tokens, and in chunks of both axes."""
    return FORMS[request.param]


def test_three_equal_items_cost_log_3(loss):
    total, count, d_query, d_item = value_and_grads(
        loss, np.ones((1, 2)), np.ones((4, 2)), np.array([2]), np.ones(1)
    )
    # p = 1/3 each; the query's gradient is sum_v p_v x_v - x_2 = 0, an item's is p_v - [v = 2].
    np.testing.assert_allclose(total, math.log(3), rtol=1e-6)
    assert count == 1
    np.testing.assert_allclose(d_query, np.zeros((1, 2)), atol=1e-6)
    np.testing.assert_allclose(d_item[:, 0], [0, 1 / 3, 1 / 3 - 1, 1 / 3], rtol=1e-6)


def test_two_items_with_odds_of_three_to_one(loss):
    item_VD = np.array([[9.0], [0.0], [math.log(3)]])
    total, count, d_query, d_item = value_and_grads(
        loss, np.ones((2, 1)), item_VD, np.array([1, 2]), np.array([1.0, 10.0])
    )
    np.testing.assert_allclose(total, math.log(4) + 10 * math.log(4 / 3), rtol=1e-6)
    assert count == 11
    slope = np.array([0, (1 / 4 - 1) + 10 / 4, 3 / 4 + 10 * (3 / 4 - 1)])
    np.testing.assert_allclose(d_item[:, 0], slope, rtol=1e-5)
    expected = [3 / 4 * math.log(3), 10 * (3 / 4 - 1) * math.log(3)]
    np.testing.assert_allclose(d_query[:, 0], expected, rtol=1e-5)


@pytest.mark.parametrize('tokens, items', [(1, 1), (7, 10), (12, 37)])
def test_equals_a_loop_in_float64(loss, tokens, items):
    data = make_loss_inputs(tokens, items, scale=2.0)
    assert_all_close(value_and_grads(loss, *data), cross_entropy_loop(*data))


@pytest.mark.parametrize('sizes', [(0, 0), (5, 0), (5, 4)])
def test_a_mesh_of_one_device_equals_a_loop_in_float64(sizes):
    """The sharded forms on one device; `parallel/mesh_test.py` runs them on eight."""
    types = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((1, 1), (DATA, MODEL), axis_types=types, devices=jax.devices()[:1])
    data = make_loss_inputs(12, 37)
    loss = partial(chunked(*sizes), mesh=mesh, num_items=37)
    assert_all_close(value_and_grads(loss, *data), cross_entropy_loop(*data))
    with pytest.raises(ValueError, match='a mesh needs num_items'):
        chunked(*sizes)(*data, mesh=mesh)


@pytest.mark.parametrize('items', [1, 2, 5, 97, 1000, 2049])
def test_chunks_do_not_change_the_loss(items):
    data = make_loss_inputs(53, items, scale=2.0)
    expected = value_and_grads(losses.cross_entropy, *data)
    # Chunks of one item take the most iterations; with few items the other sizes are clipped to V.
    sizes = [(7, 7), (0, 64)] + [(64, 1), (1, 0), (5000, 5000)] * (items == 97)
    for size in sizes:
        assert_all_close(value_and_grads(chunked(*size), *data), expected)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 9),
    items=st.integers(1, 23),
    width=st.integers(1, 5),
    chunk_tokens=st.integers(0, 10),
    chunk_items=st.integers(0, 25),
    seed=st.integers(0, 99),
)
def test_chunks_of_any_size_and_inputs_of_any_shape(
    tokens, items, width, chunk_tokens, chunk_items, seed
):
    data = make_loss_inputs(tokens, items, width, seed)
    assert_all_close(
        value_and_grads(chunked(chunk_tokens, chunk_items), *data),
        cross_entropy_loop(*data),
    )


@cache
def with_num_tokens(chunk_tokens, chunk_items):
    """The loss as a function of (queries, table, targets, weights, num_tokens)."""
    loss = chunked(chunk_tokens, chunk_items)
    return lambda *args: loss(*args[:-1], num_tokens=args[-1])


@pytest.mark.parametrize('size', [(3, 0), (0, 0), (3, 4)])
@pytest.mark.parametrize('number', [0, 1, 3, 4, 7])
def test_tokens_from_num_tokens_on_are_ignored(size, number):
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(7, 10, seed=1)
    weight_T = np.where(np.arange(7) < number, weight_T, 0)
    actual = value_and_grads(
        with_num_tokens(*size), query_TD, item_VD, target_T, weight_T, np.int32(number)
    )
    assert_all_close(actual, cross_entropy_loop(query_TD, item_VD, target_T, weight_T))


def test_chunks_from_num_tokens_on_are_skipped():
    """Queries past the chunk of the last counted token are NaN and do no harm."""
    query_TD, item_VD, _, _ = make_loss_inputs(7, 10)
    target_T, weight_T = np.full(7, 2, np.int32), np.eye(7, dtype=np.float32)[0]
    query_TD[3:] = np.nan
    loss = with_num_tokens(3, 0)
    _, _, d_query, _ = value_and_grads(loss, query_TD, item_VD, target_T, weight_T, np.int32(1))
    _, _, expected, _ = cross_entropy_loop(query_TD, item_VD, target_T, weight_T)
    assert_all_close([d_query], [expected])


@pytest.mark.parametrize('target', [6, 7, 8, 9, 10])
def test_target_anywhere_in_the_overlapping_last_chunk(target):
    # Ten items in chunks of four: 1-4, 5-8, and 7-10, where 7 and 8 must not be counted twice.
    query_TD, item_VD, _, _ = make_loss_inputs(5, 10)
    data = query_TD, item_VD, np.full(5, target), np.array([1, 2, 0, 1, 3], np.float32)
    for loss in (chunked(0, 4), chunked(2, 4), chunked(2, 0)):
        assert_all_close(value_and_grads(loss, *data), cross_entropy_loop(*data))


def test_weights_of_zero_give_zeros(loss):
    query_TD, item_VD, target_T, _ = make_loss_inputs(7, 10)
    for result in value_and_grads(loss, query_TD, item_VD, target_T, np.zeros(7, np.float32)):
        np.testing.assert_array_equal(result, np.zeros(result.shape))


def test_gradient_of_the_weights(loss):
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(7, 10)
    target_T = np.maximum(target_T, 1)

    inputs = jnp.asarray(query_TD), jnp.asarray(item_VD), jnp.asarray(target_T)

    def mean(weight_T):
        total, count = loss(*inputs, weight_T)
        return total / count

    each = [
        cross_entropy_loop(query_TD[[t]], item_VD, target_T[[t]], np.ones(1))[0] for t in range(7)
    ]
    count = weight_T.sum()
    expected = (each - np.dot(each, weight_T) / count) / count
    np.testing.assert_allclose(jax.jit(jax.grad(mean))(weight_T), expected, atol=1e-6)


def test_the_gradient_is_multiplied_by_the_cotangent(loss):
    data = make_loss_inputs(7, 10)
    mean = jax.grad(lambda *args: jnp.divide(*loss(*args)), argnums=(0, 1))
    _, count, *grads = cross_entropy_loop(*data)
    assert_all_close(mean(*map(jnp.asarray, data)), [grad / count for grad in grads])


def test_scores_of_ten_thousand(loss):
    # Scores 1e4, 0, -1e4, 1e4, 0: items 1 and 4 have probability 1/2 each.
    item_VD = np.array([[100.0], [100.0], [0.0], [-100.0], [100.0], [0.0]])
    total, _, d_query, d_item = value_and_grads(
        loss, np.full((3, 1), 100.0), item_VD, np.array([1, 2, 3]), np.array([1.0, 1.0, 1.0])
    )
    np.testing.assert_allclose(total, 0 + 1e4 + 2e4 + 3 * math.log(2), rtol=1e-6)
    np.testing.assert_allclose(d_query[:, 0], [0, 100, 200], atol=0.2)
    np.testing.assert_allclose(d_item[:, 0], [0, 50, -100, -100, 150, 0], atol=0.2)


@pytest.mark.parametrize('junk', [1e30, -1e30, np.inf, np.nan])
def test_row_0_is_never_read(loss, junk):
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(12, 10)
    assert (target_T == 0).any()
    filled_VD = item_VD.copy()
    filled_VD[0] = junk
    result = value_and_grads(loss, query_TD, filled_VD, target_T, weight_T)
    assert_all_close(result, cross_entropy_loop(query_TD, item_VD, target_T, weight_T))
    np.testing.assert_array_equal(result[3][0], np.zeros(item_VD.shape[1]))


@pytest.mark.parametrize('loss', [losses.cross_entropy, chunked(16, 0), chunked(16, 32)])
def test_bfloat16_products_are_summed_in_float32(loss):
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(64, 300, 32)
    query_TD, item_VD = query_TD.astype(jnp.bfloat16), item_VD.astype(jnp.bfloat16)
    result = value_and_grads(loss, query_TD, item_VD, target_T, weight_T)
    expected = cross_entropy_loop(query_TD, item_VD, target_T, weight_T)
    assert result[0].dtype == result[1].dtype == jnp.float32
    assert result[2].dtype == result[3].dtype == jnp.bfloat16
    # The value is rounded to float32 only; a gradient is made of probabilities rounded to bfloat16
    # (2^-9) and is itself rounded once or twice more.
    assert_all_close(result[:2], expected[:2], bound=1e-5)
    assert_all_close(result[2:], expected[2:], bound=3 * 2**-9)


@pytest.mark.parametrize('loss', [losses.cross_entropy, chunked(2, 0), chunked(2, 2)])
def test_bfloat16_gradients_are_accumulated_in_float32(loss):
    # A bfloat16 sum of equal terms stops growing at 256 terms. Here each of 1200 tokens adds -3/4
    # to the gradient of item 1 and 1/4 to those of the others, all exact in bfloat16.
    ones = np.ones((1200, 1), jnp.bfloat16)
    item_VD = np.ones((5, 1), jnp.bfloat16)
    _, _, _, d_item = value_and_grads(loss, ones, item_VD, np.ones(1200, np.int32), np.ones(1200))
    np.testing.assert_array_equal(np.asarray(d_item, np.float32)[:, 0], [0, -900, 300, 300, 300])
    # Over 1200 items: the query's gradient is the mean of x_v minus the target's vector.
    item_VD = np.full((1201, 1), 2, jnp.bfloat16)
    item_VD[1200] = 1
    query_TD = np.zeros((3, 1), jnp.bfloat16)
    _, _, d_query, _ = value_and_grads(loss, query_TD, item_VD, np.full(3, 1200), np.ones(3))
    np.testing.assert_allclose(np.asarray(d_query, np.float32), 1 - 1 / 1200, rtol=2**-8)


def test_without_jit(loss):
    data = make_loss_inputs(7, 10)
    assert_all_close(
        value_and_grads(loss, *data, compiled=False),
        value_and_grads(loss, *data),
        bound=1e-6,
    )


def test_the_value_alone_is_the_value(loss):
    data = make_loss_inputs(7, 10)
    assert_all_close(loss(*map(jnp.asarray, data)), cross_entropy_loop(*data)[:2])


def test_under_vmap(loss):
    rows = [make_loss_inputs(7, 10, seed=seed) for seed in range(3)]
    stacked = [jnp.stack(column) for column in zip(*rows)]
    grad = jax.vmap(jax.value_and_grad(lambda *args: loss(*args)[0], argnums=(0, 1)))
    totals, grads = jax.jit(grad)(*stacked)
    for i, row in enumerate(rows):
        total, _, *expected = cross_entropy_loop(*row)
        assert_all_close([totals[i], *(g[i] for g in grads)], [total, *expected])


def test_in_a_scan_of_steps_with_checkpoint_and_donated_parameters(loss):
    """Several training steps per dispatch, as the training loop runs them."""
    batches = [make_loss_inputs(7, 10, seed=seed) for seed in range(3)]

    def step(item_VD, batch):
        @jax.checkpoint
        def mean(item_VD):
            query_TD = jnp.tanh(batch[0] @ item_VD[1:9])
            return jnp.divide(*loss(query_TD, item_VD, batch[1], batch[2]))

        value, grad = jax.value_and_grad(mean)(item_VD)
        return item_VD - 0.1 * grad, value

    start = batches[0][1]
    inputs = [(query, target, weight) for query, _, target, weight in batches]
    stacked = [jnp.stack(column) for column in zip(*inputs)]
    block = jax.jit(lambda item, batches: jax.lax.scan(step, item, batches), donate_argnums=0)
    donated = jnp.array(start)
    item_VD, values = block(donated, stacked)
    assert donated.is_deleted()

    def naive(item_VD, query, target, weight):
        query_TD = jnp.tanh(query @ item_VD[1:9])
        logp_TV = jax.nn.log_softmax(query_TD @ item_VD[1:].T)
        return -(logp_TV[jnp.arange(7), target - 1] * weight).sum() / weight.sum()

    expected_VD, expected = jnp.asarray(start), []
    for batch in inputs:
        value, grad = jax.value_and_grad(naive)(expected_VD, *batch)
        expected_VD = expected_VD - 0.1 * grad
        expected.append(value)
    assert_all_close([item_VD, values], [expected_VD, expected])


def temporaries(loss, tokens, items, width=64):
    """Bytes of temporaries of the compiled gradient, without inputs and outputs."""
    shapes = [((tokens, width), 'float32'), ((items + 1, width), 'float32')]
    shapes += [((tokens,), 'int32'), ((tokens,), 'float32')]
    f = jax.jit(jax.grad(lambda *args: loss(*args)[0], argnums=(0, 1)))
    compiled = f.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_with_chunks_of_items_grows_neither_with_v_nor_with_t_times_v():
    loss = chunked(128, 1024)
    base = temporaries(loss, 512, 10_000)
    assert base < 4 * 512 * 10_000 / 10
    assert abs(temporaries(loss, 512, 80_000) - base) < 2**16
    # A few [T, D] grow with the tokens.
    assert temporaries(loss, 4096, 80_000) - base < 3 * 4 * 4096 * 64
    assert temporaries(loss, 4096, 80_000) < 4 * 4096 * 80_000 / 100


def test_memory_with_chunks_of_tokens_is_a_chunk_of_logits_and_three_tables():
    table = 4 * 20_000 * 64
    assert temporaries(chunked(128, 0), 1024, 20_000) < 4 * 128 * 20_000 + 4 * table


def test_memory_without_chunks_is_one_array_of_logits():
    assert temporaries(losses.cross_entropy, 512, 20_000) < 1.3 * 4 * 512 * 20_000


@pytest.mark.parametrize('sizes', [(-1, 0), (0, -1)])
def test_negative_chunk_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match='chunks must be >= 0'):
        chunked(*sizes)(*make_loss_inputs(4, 5))
