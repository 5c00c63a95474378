"""Models with branches on a mesh of eight devices."""

import jax
import numpy as np
import pytest
from device_fixtures import on_eight
from fixtures import BATCH, assert_close, compile_gradient, make_model

from fame_jax.batch import Batch
from fame_jax.parallel import mesh as mesh_lib


@on_eight
@pytest.mark.parametrize('name', ['branched_sasrec', 'branched_fame'])
def test_the_objective_on_a_mesh_is_that_of_one_device(name):
    module, params = make_model(name, width=16, branches=2, dropout=0.25)
    batch = Batch(*(np.tile(field, (8, 1))[:8] for field in BATCH))
    key, results = jax.random.key(1), []
    for mesh in (None, mesh_lib.make_mesh(2, 4)):
        on_mesh = module.clone(mesh=mesh)
        rows_of_table = mesh_lib.table_rows(12, mesh)
        padded = np.zeros((rows_of_table, 16), np.float32)
        padded[:13] = params['item_table'][:13]
        placed = mesh_lib.device_put({**params, 'item_table': padded}, mesh)
        on_devices = mesh_lib.host_to_device(mesh, 0)(batch)
        (total, _), gradient = compile_gradient(on_mesh)(placed, on_devices, key)
        results.append((total, {**gradient, 'item_table': gradient['item_table'][:13]}))
    (total, gradient), (other_total, other_gradient) = results
    assert_close(other_total, total)
    jax.tree.map(assert_close, other_gradient, gradient)
