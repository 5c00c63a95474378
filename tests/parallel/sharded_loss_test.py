"""The cross-entropy on a mesh of eight devices is that of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_fixtures import MESHES, on_eight
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from fame_jax import losses
from fame_jax.models.item_model import unit
from fame_jax.parallel import mesh as mesh_lib


def cosine(row_VD):
    return unit(row_VD, 0.5)


def half_cosine(row_VD):
    """The transform of a bfloat16 model, whose table is float32."""
    return unit(row_VD.astype(jnp.bfloat16), 0.5)


def loss_and_gradients(loss, *args):
    """3 times the sum plus the count, and its gradients by all float arrays but the shares."""

    def scalar(query_TD, item_VD, weight_T, log_extra_T, target_T, share_TF):
        labels = {'share_TF': share_TF, 'log_extra_T': log_extra_T}
        total, count = loss(query_TD, item_VD, target_T, weight_T, **labels)
        return 3 * total + count

    number = 3 if args[3] is None else 4
    return jax.jit(jax.value_and_grad(scalar, argnums=tuple(range(number))))(*args)


def assert_sharded_is_one_device(
    mesh,
    num_items,
    tokens,
    chunks,
    item_transform=losses.identity,
    seed=0,
    dtypes=(jnp.float32, jnp.float32),
    padding=None,
    bound=1e-4,
    soft=False,
):
    """Value and gradients on a mesh against those of one device.

    Padding rows get the value `padding`, and must have gradients of 0. If `soft`, labels are mixes
    of three items, and each token has a further term in its sum.
    """
    mesh = mesh_lib.make_mesh(*mesh)
    keys = jax.random.split(jax.random.key(seed), 4)
    query_TD = jax.random.normal(keys[0], (8 * tokens, 4)).astype(dtypes[0])
    rows = mesh_lib.table_rows(num_items, mesh)
    item_VD = jax.random.normal(keys[1], (rows, 4)).astype(dtypes[1])
    target_T = jax.random.randint(keys[2], (8 * tokens,), 1, num_items + 1)
    weight_T = (jax.random.uniform(keys[3], (8 * tokens,)) > 0.3).astype(jnp.float32)
    target_T = jnp.where(weight_T > 0, target_T, 0)

    log_extra_T = share_TF = None
    if soft:
        more_TF = jax.random.randint(keys[3], (8 * tokens, 2), 0, num_items + 1)
        target_T = jnp.concatenate([target_T[:, None], more_TF], axis=1)
        share_TF = jax.random.uniform(keys[2], target_T.shape) * (target_T > 0)
        share_TF /= jnp.maximum(share_TF.sum(axis=1, keepdims=True), 1e-6)
        log_extra_T = jax.random.normal(keys[1], (8 * tokens,))

    def one(query_TD, item_VD, *others, **labels):
        vector_VD = item_transform(item_VD[: num_items + 1])
        return losses.cross_entropy(query_TD, vector_VD, *others, **labels)

    chunk_tokens, chunk_items = chunks
    many = functools.partial(
        losses.cross_entropy,
        mesh=mesh,
        num_items=num_items,
        chunk_tokens=chunk_tokens,
        chunk_items=chunk_items,
        item_transform=item_transform,
    )
    others = weight_T, log_extra_T, target_T, share_TF
    expected = loss_and_gradients(one, query_TD, item_VD, *others)
    if padding is not None:
        item_VD = item_VD.at[0].set(padding).at[num_items + 1 :].set(padding)
    actual = loss_and_gradients(many, query_TD, item_VD, *others)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound * max(1, np.abs(b).max()))
    d_item_VD = np.asarray(actual[1][1])
    assert not np.any(d_item_VD[0]) and not np.any(d_item_VD[num_items + 1 :])


@on_eight
@given(
    mesh=st.sampled_from(MESHES),
    num_items=st.integers(1, 30),
    tokens=st.integers(1, 4),
    chunks=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    item_transform=st.sampled_from([losses.identity, cosine]),
    seed=st.integers(0, 99),
    soft=st.booleans(),
)
# Three rows per device in chunks of two; the last two devices have padding rows only.
@example(
    mesh=(1, 8), num_items=17, tokens=1, chunks=(3, 2), item_transform=cosine, seed=0, soft=False
)
@example(
    mesh=(1, 8), num_items=17, tokens=1, chunks=(3, 2), item_transform=cosine, seed=0, soft=True
)
@example(
    mesh=(2, 4), num_items=17, tokens=2, chunks=(3, 0), item_transform=cosine, seed=0, soft=True
)
@settings(max_examples=4, deadline=None, derandomize=True)
def test_any_mesh_chunks_and_shapes(mesh, num_items, tokens, chunks, item_transform, seed, soft):
    """Some devices have padding rows only."""
    assert_sharded_is_one_device(mesh, num_items, tokens, chunks, item_transform, seed, soft=soft)


@on_eight
@pytest.mark.parametrize('data, model', MESHES)
def test_chunks_of_items_on_each_mesh(data, model):
    """Fewer items per chunk than a device has rows, and not a divisor of them."""
    for num_items, chunks in ((23, (3, 2)), (100, (0, 9))):
        assert_sharded_is_one_device((data, model), num_items, 3, chunks, cosine)


@on_eight
@pytest.mark.parametrize('chunk_items', [0, 5])
@pytest.mark.parametrize(
    'item_transform, dtypes',
    [
        (losses.identity, (jnp.bfloat16, jnp.bfloat16)),
        (half_cosine, (jnp.bfloat16, jnp.float32)),
    ],
)
def test_bfloat16(item_transform, dtypes, chunk_items):
    chunks, bound = (5, chunk_items), 4 * 2**-8
    assert_sharded_is_one_device((2, 4), 45, 4, chunks, item_transform, dtypes=dtypes, bound=bound)


@on_eight
@pytest.mark.parametrize('padding', [1e30, np.inf, np.nan])
def test_padding_rows_have_no_effect(padding):
    """Row 0 and rows past V, in a chunk with items and in one without."""
    assert_sharded_is_one_device((2, 4), 9, 2, (3, 2), padding=padding)


@on_eight
def test_negative_chunk_sizes_are_refused():
    with pytest.raises(ValueError, match='chunks must be >= 0, not 0 tokens and -1 items'):
        assert_sharded_is_one_device((2, 4), 9, 2, (0, -1))


@on_eight
@pytest.mark.parametrize('data, model', [(2, 4), (1, 8)])
def test_chunks_of_items_need_no_second_table(data, model):
    """Temporaries are those of a chunk and one gradient of a device's rows, summed over `data`."""
    mesh = mesh_lib.make_mesh(data, model)
    tokens, items = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ('data', 'model'))

    def temporaries(num_items, chunk_items):
        rows = mesh_lib.table_rows(num_items, mesh)
        shapes = [((512, 64), 'float32', tokens), ((rows, 64), 'float32', items)]
        shapes += [((512,), 'int32', tokens), ((512,), 'float32', tokens)]
        many = functools.partial(
            losses.cross_entropy,
            mesh=mesh,
            num_items=num_items,
            chunk_tokens=64,
            chunk_items=chunk_items,
            item_transform=cosine,
        )
        f = jax.jit(jax.grad(lambda *args: many(*args)[0], argnums=(0, 1)))
        args = [jax.ShapeDtypeStruct(*shape[:2], sharding=shape[2]) for shape in shapes]
        return f.lower(*args).compile().memory_analysis().temp_size_in_bytes

    part = mesh_lib.table_rows(200_000, mesh) // model * 64 * 4
    summed = part if data > 1 else 0
    assert temporaries(200_000, 512) < summed + 2e6
    assert temporaries(200_000, 0) > summed + 2 * part
