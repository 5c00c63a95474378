"""Runs that share eight devices: as on one device, and without any exchange between devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_fixtures import collectives, on_eight

from fame_jax.batch import Batch
from fame_jax.main import main
from fame_jax.parallel import mesh as mesh_lib
from fame_jax.training import members, step
from fame_jax.training.optimizer import make_optimizer

pytestmark = on_eight

NONE = np.zeros(0, np.float32)


def objective(params, batch, key):
    noise = jax.random.uniform(key, params['w'].shape)
    error = (params['w'] * noise - batch.tokens_BL.mean()) ** 2
    return error.sum(), jnp.float32(2), {}


def batch_of(value):
    field = np.full((2, 4), value)
    return Batch(*[field.astype(np.int32)] * 4, field.astype(np.float32))


@pytest.mark.parametrize('number', [8, 16])
def test_a_device_computes_its_own_members(number):
    one = step.make_step(objective, make_optimizer(0.1, ema=0.5))
    mesh = mesh_lib.make_member_mesh(number)
    assert mesh.size == 8
    keys = jnp.stack([jax.random.key(s) for s in range(number)])
    batches = members.stack_members([[batch_of(s)] for s in range(number)], [NONE] * number)

    def stacked():
        optimizer = make_optimizer(0.1, ema=0.5)
        states = [
            step.init_state({'w': jnp.full(5, 1.0 + s)}, optimizer, None) for s in range(number)
        ]
        return members.stack_trees(states)

    plain = step.Program(members.make_member_step(one), size=2)
    expected, sums = plain(stacked(), batches, keys)
    shared = step.Program(members.make_member_step(one, mesh=mesh), size=2)
    state, key = mesh_lib.share_members((stacked(), keys), mesh)
    new, sums_shared = shared(state, batches, key)
    for first, second in zip(jax.tree.leaves(new), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-6)
    for name in sums:
        np.testing.assert_allclose(sums_shared[name], sums[name], rtol=1e-6)
    assert new.params['w'].sharding.shard_shape((number, 5)) == (number // 8, 5)
    assert collectives(shared.compiled(batches[0])) == []
    for part in members.unstack_tree(new, number):
        assert len(part.params['w'].sharding.device_set) == 1


SMALL = (
    *('--synthetic=users=120,items=40', '--model=sasrec', '--width=8', '--num_blocks=1'),
    *('--max_length=12', '--row_length=16', '--rows_per_step=4', '--pretrain_epochs=2'),
    '--progress=lines',
)


def curve(folder):
    """Losses and validation metrics of all epochs."""
    lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    return [
        line.get('loss', line.get('ndcg@20'))
        for line in lines
        if line['split'] in ('train', 'validation')
    ]


def test_three_seeds_on_eight_devices_are_the_runs_of_their_seeds(tmp_path, capsys):
    """Three devices are used. The second seed is also run alone."""
    many = [*SMALL, f'--workdir={tmp_path / "many"}', '--seeds=0,1,7', '--members=vmap']
    assert main(many) == 0
    assert 'pretrain: 3 runs in one program, on 3 devices' in capsys.readouterr().err
    assert main([*SMALL, f'--workdir={tmp_path / "one"}', '--seed=1']) == 0
    assert curve(tmp_path / 'many' / 'seed_1') == pytest.approx(curve(tmp_path / 'one'), rel=1e-3)


def test_seeds_on_a_mesh_train_one_after_another_each_on_all_its_devices(tmp_path, capsys):
    mesh = [*SMALL, '--data_parallel=2', '--model_parallel=2']
    assert main([*mesh, f'--workdir={tmp_path / "many"}', '--seeds=0,1']) == 0
    assert 'in one program' not in capsys.readouterr().err
    assert main([*mesh, f'--workdir={tmp_path / "one"}', '--seed=1']) == 0
    many, one = curve(tmp_path / 'many' / 'seed_1'), curve(tmp_path / 'one')
    assert many == one and len(set(many)) == len(many) > 4
    assert many != curve(tmp_path / 'many' / 'seed_0')
