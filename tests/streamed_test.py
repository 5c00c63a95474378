"""The streamed cross-entropy of raw rows: gradients through `prepare`, and what it holds."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses_test import assert_close, by_loop, chunked, graded, make

from fame_jax import losses
from fame_jax.models.items import unit

TEMPERATURE = 0.5


def cosine(row_VD):
    return unit(row_VD, TEMPERATURE)


def half_cosine(row_VD):
    """As a model of bfloat16 has it: the table is float32."""
    return unit(row_VD.astype(jnp.bfloat16), TEMPERATURE)


def rooted(row_VD):
    """Another function of a row, that reads no row as zeros and changes the width."""
    return jnp.concatenate([jnp.sin(row_VD), row_VD[:, :1] ** 2], axis=1)


@cache
def prepared(prepare, *sizes):
    return partial(chunked(*sizes), prepare=prepare)


def by_loop_of_cosines(query_TD, item_VD, target_T, weight_T):
    """The loop over vectors, and its gradient brought back to raw rows, one by one, in float64."""
    raw_VD = np.asarray(item_VD, np.float64)
    length_V = np.linalg.norm(raw_VD, axis=1)
    unit_VD = raw_VD / length_V[:, None]
    total, count, d_query, d_unit = by_loop(query_TD, unit_VD / TEMPERATURE, target_T, weight_T)
    d_raw = np.zeros_like(raw_VD)
    for v in range(len(raw_VD)):
        along = unit_VD[v] * (d_unit[v] @ unit_VD[v])
        d_raw[v] = (d_unit[v] - along) / (length_V[v] * TEMPERATURE)
    return total, count, d_query, d_raw


@pytest.mark.parametrize('sizes', [(0, 4), (5, 36), (4, 0)])
def test_raw_rows_against_a_loop_in_float64(sizes):
    data = make(12, 37)
    assert_close(graded(prepared(cosine, *sizes), *data), by_loop_of_cosines(*data))


@pytest.mark.parametrize('items', [2, 64, 65])
def test_raw_rows_in_chunks_are_raw_rows_at_once(items):
    """The gradient by the raw table, of as many items as a chunk, fewer, and one more."""
    data = make(53, items, scale=2.0)

    def at_once(query_TD, item_VD, target_T, weight_T):
        return losses.cross_entropy(query_TD, cosine(item_VD), target_T, weight_T)

    expected = graded(at_once, *data)
    for sizes in [(7, 64), (0, 1)] if items < 65 else [(7, 64)]:
        assert_close(graded(prepared(cosine, *sizes), *data), expected)


def test_any_function_of_a_row_is_differentiated():
    query_TD, item_VD, target_T, weight_T = make(12, 37)
    data = np.concatenate([query_TD, query_TD[:, :1]], axis=1), item_VD, target_T, weight_T

    def naive(query_TD, item_VD, target_T, weight_T):
        logp_TV = jax.nn.log_softmax(query_TD @ rooted(item_VD)[1:].T)
        return -(logp_TV[jnp.arange(12), target_T - 1] * weight_T).sum(), weight_T.sum()

    expected = graded(naive, *data)
    assert_close(graded(prepared(rooted, 5, 8), *data), expected)
    assert_close(graded(prepared(rooted, 5, 0), *data), expected)


@pytest.mark.parametrize('junk', [1e30, np.inf, np.nan])
def test_the_raw_row_of_the_padding_is_never_read(junk):
    query_TD, item_VD, target_T, weight_T = make(12, 10)
    expected = by_loop_of_cosines(query_TD, item_VD, target_T, weight_T)
    item_VD[0] = junk
    result = graded(prepared(cosine, 5, 4), query_TD, item_VD, target_T, weight_T)
    assert_close(result, expected)
    assert not np.any(result[3][0])


def test_bfloat16_vectors_of_a_float32_table():
    query_TD, item_VD, target_T, weight_T = make(64, 300, 32)
    data = query_TD.astype(jnp.bfloat16), item_VD, target_T, weight_T
    result = graded(prepared(half_cosine, 16, 32), *data)
    assert [part.dtype for part in result[1:]] == [jnp.float32, jnp.bfloat16, jnp.float32]

    def at_once(query_TD, item_VD, target_T, weight_T):
        return losses.cross_entropy(query_TD, half_cosine(item_VD), target_T, weight_T)

    expected = graded(at_once, *data)
    assert_close(result[:2], expected[:2])
    assert_close(result[2:], expected[2:], bound=4 * 2**-9)


def test_raw_rows_under_vmap_and_checkpoint():
    tables = [make(7, 10, seed=seed) for seed in range(2)]
    stacked = [jnp.stack(column) for column in zip(*tables)]
    loss = jax.checkpoint(lambda *args: prepared(cosine, 3, 4)(*args)[0])
    totals, d_item = jax.vmap(jax.value_and_grad(loss, argnums=1))(*stacked)
    for i, row in enumerate(tables):
        total, _, _, expected = by_loop_of_cosines(*row)
        assert_close([totals[i], d_item[i]], [total, expected])


def held(items, tokens=4096, width=64):
    """Bytes of temporaries, and of inputs and outputs, of the gradient by queries and raw table."""
    shapes = [((tokens, width), 'float32'), ((items + 1, width), 'float32')]
    shapes += [((tokens,), 'int32'), ((tokens,), 'float32')]
    loss = prepared(cosine, 512, 2048)
    f = jax.jit(jax.grad(lambda *args: loss(*args)[0], argnums=(0, 1)))
    compiled = f.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_million_items_take_no_more_than_a_chunk():
    one, two = held(1_000_000), held(2_000_000)
    assert one < 0.02 * 4 * 4096 * 1_000_000
    assert abs(two - one) < 0.01 * one
    # Far less than a second table, 256 MB.
    assert one < 40e6
