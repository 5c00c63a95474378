"""Small parameters as one vector: the same steps as without, in fewer operations."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_fixtures import BATCH, OTHER, TINY, first_step

from fame_jax import losses, stages
from fame_jax.config import flags
from fame_jax.main import main
from fame_jax.models import registry
from fame_jax.stages import train
from fame_jax.stages.members import Group
from fame_jax.training import loop, members, packed, step
from fame_jax.training.optimizer import make_optimizer

TREE = {
    'b': np.arange(6, dtype=np.float32).reshape(2, 3),
    'a': np.float32(7),
    'large': np.ones((packed.LARGEST + 1,), np.float32),
    'whole': np.arange(3),
    'half': np.ones(2, np.float16),
    'c': [np.full(4, 9, np.float32)],
}


def assert_equal_trees(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_small_arrays_are_joined_and_come_back():
    found = packed.pack(TREE)
    assert found.vector.tolist() == [7, *range(6), 9, 9, 9, 9]
    assert [x.dtype for x in found.others] == [np.float16, np.float32, np.int64]
    assert_equal_trees(found.unpack(), TREE)
    assert packed.pack({'whole': TREE['whole']}).vector.shape == (0,)


def test_members_keep_their_axis():
    stacked = jax.tree.map(lambda x: np.stack([x, x + 1, x + 2]), TREE)
    found = packed.pack(stacked, num_axes=1)
    assert found.vector.shape == (3, 11) and found.vector[2, 0] == 9
    assert_equal_trees(found.unpack(), stacked)


def test_the_gradient_is_that_of_the_tree():
    def loss(tree):
        return tree['a'] * jnp.sum(tree['b'] ** 2) + 3 * tree['c'][0][1]

    tree = {name: TREE[name] for name in ('a', 'b', 'c')}
    gradient = jax.grad(lambda found: loss(found.unpack()))(packed.pack(tree))
    assert_equal_trees(gradient.unpack(), jax.grad(loss)(tree))


def test_every_part_like_the_parameters_is_packed():
    params = {'a': TREE['a'], 'b': TREE['b']}
    optimizer = make_optimizer(0.1, 0.01, ema=0.9)
    state = step.init_state(params, optimizer, None)
    found = packed.pack_all(params, state)
    nodes = jax.tree.leaves(found, is_leaf=lambda node: isinstance(node, packed.Packed))
    # The parameters, two moments and the average; three counts and the number of the step.
    assert sum(isinstance(node, packed.Packed) for node in nodes) == 4
    assert_equal_trees(packed.unpack_all(found), state)
    assert_equal_trees(packed.unpack_all(state), state)


CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize('name', ['sasrec', 'fame'])
def test_a_program_takes_the_same_steps(name):
    """With weight decay and an average of the parameters."""
    # Without the bias of keys, whose gradient is 0 but for rounding, of which Adam makes steps.
    module = registry.make(name, TINY | {'attention_bias': False}, num_items=10)
    params = registry.init_params(module, jax.random.key(0))
    optimizer = make_optimizer(0.01, 0.1, ema=0.9)
    take_step = step.make_step(
        functools.partial(module.objective, loss=losses.LossOptions()), optimizer
    )
    states = []
    for packs in (False, True):
        program = step.Program(take_step, 2, packs=packs)
        state, key = step.init_state(loop.copy(params), optimizer, None), jax.random.key(1)
        state, _ = program(state, [BATCH, OTHER], key)
        states.append(program(state, [BATCH], key))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    jax.tree.map(CLOSE, *states)
    assert int(states[1][0].step) == 3


def test_members_take_the_same_steps():
    one, state = first_step('sasrec')
    other = first_step('sasrec')[1]._replace(step=jnp.int32(5))
    batches = members.stack_members([[BATCH, OTHER], [OTHER]], [np.zeros(0, np.float32)] * 2)
    key = jnp.stack([jax.random.key(1), jax.random.key(2)])
    found = [
        step.Program(members.make_member_step(one), 2, packs=packs)(
            members.stack_trees([loop.copy(state), loop.copy(other)]), batches, key
        )
        for packs in (False, True)
    ]
    jax.tree.map(CLOSE, *found)


SMALL = ['--synthetic=users=60,items=40', '--width=8', '--progress=none', '--model=sasrec']
SMALL += ['--pretrain_epochs=2', '--ema=.9', '--checkpoint_seconds=0', '--num_blocks=1']


def test_programs_for_a_gpu_pack(tmp_path, monkeypatch):
    """But not where the optimizer tells parameters apart."""
    stay = ['--unseen_items=kept', '--item_init=text']
    for number, (backend, more) in enumerate((('cpu', []), ('gpu', []), ('gpu', stay))):
        monkeypatch.setattr(train.jax, 'default_backend', lambda backend=backend: backend)
        argv = [*SMALL, *more, f'--workdir={tmp_path}/{number}']
        argv += [f'--stages=prepare,{"text," if more else ""}pretrain']
        with contextlib.closing(stages.open_run(flags.parse(argv))) as context:
            stages.STAGES['prepare'](context)
            packs = train.make_setup(context, 'pretrain').program.packs
        assert packs == (backend == 'gpu' and not more)


def test_a_group_of_seeds_packs_as_one_seed_does(tmp_path, monkeypatch):
    argv = [*SMALL, f'--workdir={tmp_path}', '--stages=prepare,pretrain']
    for packs in (False, True):
        monkeypatch.setattr(train, '_packs', lambda context, module, packs=packs: packs)
        with contextlib.closing(stages.open_run(flags.parse(argv))) as context:
            stages.STAGES['prepare'](context)
            assert Group([context, context], 'pretrain').program.packs == packs


def test_a_run_ends_as_without_and_an_interrupted_one_too(tmp_path, monkeypatch):
    def run(name, code=0):
        assert main([*SMALL, f'--workdir={tmp_path}/{name}']) == code
        if code:
            return None
        with np.load(tmp_path / name / 'ranks.npz') as ranks:
            return {key: ranks[key] for key in ranks.files}

    plain = run('plain')
    monkeypatch.setattr(train, '_packs', lambda context, module: True)
    joined = run('joined')
    for key, ranks in plain.items():  # but for ties of rounding
        assert np.mean(ranks == joined[key]) > 0.9
    call, left = step.Program.__call__, [2]

    def call_or_stop(self, state, block, key):
        assert self.packs
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return call(self, state, block, key)

    with monkeypatch.context() as patch:
        patch.setattr(step.Program, '__call__', call_or_stop)
        run('stopped', code=130)
    for key, ranks in run('stopped').items():
        np.testing.assert_array_equal(ranks, joined[key])
