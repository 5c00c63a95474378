"""The cross-entropy of table rows: gradients through `item_transform`, and memory in chunks."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import assert_all_close, chunked, make_loss_inputs, value_and_grads
from oracles import cross_entropy_loop

from fame_jax import losses
from fame_jax.models.item_model import unit

TEMPERATURE = 0.5


def cosine(row_VD):
    return unit(row_VD, TEMPERATURE)


def half_cosine(row_VD):
    """The transform of a bfloat16 model, whose table is float32."""
    return unit(row_VD.astype(jnp.bfloat16), TEMPERATURE)


def widened(row_VD):
    """A transform that changes the width."""
    return jnp.concatenate([jnp.sin(row_VD), row_VD[:, :1] ** 2], axis=1)


@cache
def transformed(item_transform, *sizes):
    return partial(chunked(*sizes), item_transform=item_transform)


def cosine_loop(query_TD, item_VD, target_T, weight_T):
    """The loop over unit vectors, and its gradient by the rows, one by one, in float64."""
    raw_VD = np.asarray(item_VD, np.float64)
    length_V = np.linalg.norm(raw_VD, axis=1)
    unit_VD = raw_VD / length_V[:, None]
    total, count, d_query, d_unit = cross_entropy_loop(
        query_TD, unit_VD / TEMPERATURE, target_T, weight_T
    )
    d_raw = np.zeros_like(raw_VD)
    for v in range(len(raw_VD)):
        along = unit_VD[v] * (d_unit[v] @ unit_VD[v])
        d_raw[v] = (d_unit[v] - along) / (length_V[v] * TEMPERATURE)
    return total, count, d_query, d_raw


@pytest.mark.parametrize('sizes', [(0, 4), (5, 36), (4, 0)])
def test_transformed_rows_equal_a_loop_in_float64(sizes):
    data = make_loss_inputs(12, 37)
    assert_all_close(value_and_grads(transformed(cosine, *sizes), *data), cosine_loop(*data))


@pytest.mark.parametrize('items', [2, 64, 65])
def test_transforming_chunks_is_transforming_the_table(items):
    """With fewer items than a chunk, as many, and one more."""
    data = make_loss_inputs(53, items, scale=2.0)

    def at_once(query_TD, item_VD, target_T, weight_T):
        return losses.cross_entropy(query_TD, cosine(item_VD), target_T, weight_T)

    expected = value_and_grads(at_once, *data)
    for sizes in [(7, 64), (0, 1)] if items < 65 else [(7, 64)]:
        assert_all_close(value_and_grads(transformed(cosine, *sizes), *data), expected)


def test_any_transform_is_differentiated():
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(12, 37)
    data = np.concatenate([query_TD, query_TD[:, :1]], axis=1), item_VD, target_T, weight_T

    def naive(query_TD, item_VD, target_T, weight_T):
        logp_TV = jax.nn.log_softmax(query_TD @ widened(item_VD)[1:].T)
        return -(logp_TV[jnp.arange(12), target_T - 1] * weight_T).sum(), weight_T.sum()

    expected = value_and_grads(naive, *data)
    assert_all_close(value_and_grads(transformed(widened, 5, 8), *data), expected)
    assert_all_close(value_and_grads(transformed(widened, 5, 0), *data), expected)


@pytest.mark.parametrize('junk', [1e30, np.inf, np.nan])
def test_row_0_is_never_read(junk):
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(12, 10)
    expected = cosine_loop(query_TD, item_VD, target_T, weight_T)
    item_VD[0] = junk
    result = value_and_grads(transformed(cosine, 5, 4), query_TD, item_VD, target_T, weight_T)
    assert_all_close(result, expected)
    assert not np.any(result[3][0])


def test_bfloat16_vectors_of_a_float32_table():
    query_TD, item_VD, target_T, weight_T = make_loss_inputs(64, 300, 32)
    data = query_TD.astype(jnp.bfloat16), item_VD, target_T, weight_T
    result = value_and_grads(transformed(half_cosine, 16, 32), *data)
    assert [part.dtype for part in result[1:]] == [jnp.float32, jnp.bfloat16, jnp.float32]

    def at_once(query_TD, item_VD, target_T, weight_T):
        return losses.cross_entropy(query_TD, half_cosine(item_VD), target_T, weight_T)

    expected = value_and_grads(at_once, *data)
    assert_all_close(result[:2], expected[:2])
    assert_all_close(result[2:], expected[2:], bound=4 * 2**-9)


def test_under_vmap_and_checkpoint():
    tables = [make_loss_inputs(7, 10, seed=seed) for seed in range(2)]
    stacked = [jnp.stack(column) for column in zip(*tables)]
    loss = jax.checkpoint(lambda *args: transformed(cosine, 3, 4)(*args)[0])
    totals, d_item = jax.vmap(jax.value_and_grad(loss, argnums=1))(*stacked)
    for i, row in enumerate(tables):
        total, _, _, expected = cosine_loop(*row)
        assert_all_close([totals[i], d_item[i]], [total, expected])


def temporaries(items, tokens=4096, width=64):
    """Bytes of temporaries of the gradient by queries and table."""
    shapes = [((tokens, width), 'float32'), ((items + 1, width), 'float32')]
    shapes += [((tokens,), 'int32'), ((tokens,), 'float32')]
    loss = transformed(cosine, 512, 2048)
    f = jax.jit(jax.grad(lambda *args: loss(*args)[0], argnums=(0, 1)))
    compiled = f.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_at_a_million_items_is_that_of_a_chunk():
    one, two = temporaries(1_000_000), temporaries(2_000_000)
    assert one < 0.02 * 4 * 4096 * 1_000_000
    assert abs(two - one) < 0.01 * one
    # A second table would be 256 MB.
    assert one < 40e6
