"""The mesh, and the sharding of arrays on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_fixtures import MESHES, on_eight
from jax.sharding import PartitionSpec

from fame_jax.errors import UserError
from fame_jax.parallel import mesh as mesh_lib

# A tree like a state's: a table, its moment in the optimizer, and other parameters.
TREE = {
    'item_table': np.zeros((48, 3), np.float32),
    'moment': {'item_table': np.zeros((48, 3), np.float32), 'gate': np.zeros((3, 2), np.float32)},
    'item_table_bias': np.zeros(48, np.float32),
}
TABLE, OTHER = PartitionSpec(mesh_lib.MODEL), PartitionSpec()
SPECS = {'item_table': TABLE, 'moment': {'item_table': TABLE, 'gate': OTHER}}
SPECS |= {'item_table_bias': OTHER}


def test_one_device_has_no_mesh():
    assert mesh_lib.make_mesh(1, 1) is None
    assert mesh_lib.table_rows(44, None) == 44 + 1
    assert mesh_lib.process_rows(None, 8) == slice(0, 8)
    assert mesh_lib.item_sharding(None) is None
    assert mesh_lib.device_put(TREE, None) is TREE
    assert mesh_lib.host_to_device(None, axis=0)(TREE) is TREE


def test_a_mesh_of_more_devices_than_there_are():
    with pytest.raises(UserError, match='the mesh needs 64 devices and there are'):
        mesh_lib.make_mesh(8, 8)


@on_eight
@pytest.mark.parametrize('model, rows', [(1, 46), (2, 46), (4, 48), (8, 48)])
def test_table_rows_are_a_multiple_of_the_devices_along_model(model, rows):
    assert mesh_lib.table_rows(45, mesh_lib.make_mesh(8 // model, model)) == rows


@on_eight
@pytest.mark.parametrize('data, model', MESHES)
def test_tables_are_split_over_model_and_other_arrays_replicated(data, model):
    mesh = mesh_lib.make_mesh(data, model)
    specs = jax.tree.map(lambda sharding: sharding.spec, mesh_lib.shardings(TREE, mesh))
    assert specs == SPECS
    abstract = mesh_lib.abstract(TREE, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding.spec, abstract) == SPECS
    for tree in (
        mesh_lib.device_put(TREE, mesh),
        mesh_lib.init_sharded(lambda x: jax.tree.map(lambda y: y + x, TREE), mesh)(jnp.ones(())),
    ):
        assert jax.tree.map(lambda leaf: leaf.sharding.spec, tree) == SPECS
        shapes = {shard.data.shape for shard in tree['item_table'].addressable_shards}
        assert shapes == {(48 // model, 3)}


@on_eight
@pytest.mark.parametrize('data, model', MESHES)
def test_parameters_on_a_mesh_are_compiled_once(data, model):
    traced = []

    def init(x):
        traced.append(x)
        return jax.tree.map(lambda leaf: leaf + x, TREE)

    on_mesh = mesh_lib.init_sharded(init, mesh_lib.make_mesh(data, model))
    first, count = on_mesh(jnp.zeros(())), len(traced)
    second = on_mesh(jnp.ones(()))
    assert len(traced) == count > 0
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a + 1, b), first, second)


@on_eight
@pytest.mark.parametrize('data, model', MESHES)
def test_batches_are_split_over_data_and_gathered_whole(data, model):
    mesh = mesh_lib.make_mesh(data, model)
    batch_NBL = np.arange(2 * 16 * 3).reshape(2, 16, 3)
    (array,) = mesh_lib.host_to_device(mesh, axis=1)((batch_NBL,))
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 16 // data, 3)}
    np.testing.assert_array_equal(mesh_lib.gather(array), batch_NBL)
    assert mesh_lib.process_rows(mesh, 16) == slice(0, 16)  # one process has all devices
