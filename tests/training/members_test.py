"""The step of several members against steps of one, and members that have nothing to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fame_jax.batch import Batch
from fame_jax.training import members, step
from fame_jax.training.optimizer import make_optimizer

SEEDS = 3
NONE = [np.zeros(0, np.float32)] * SEEDS  # settings in which members differ


def objective(params, batch, key):
    """A loss with random numbers, so that each member's key counts."""
    noise = jax.random.uniform(key, params['w'].shape)
    error = (params['w'] * noise - batch.tokens_BL.mean()) ** 2
    return error.sum(), jnp.float32(2), {'noise': noise.sum()}


def batch_of(value):
    field = np.full((2, 4), value)
    return Batch(*[field.astype(np.int32)] * 4, field.astype(np.float32))


@pytest.fixture
def setup():
    """The step of one, three states and three keys."""
    optimizer = make_optimizer(0.1, ema=0.5)
    one = step.make_step(objective, optimizer)
    states = [step.init_state({'w': jnp.full(5, 1.0 + s)}, optimizer, None) for s in range(SEEDS)]
    return one, states, [jax.random.key(s) for s in range(SEEDS)]


def run_alone(one, state, key, batches):
    state, sums = jax.tree.map(jnp.copy, state), []
    for batch in batches:
        state, of_step = one(state, batch, key)
        sums.append({name: float(value) for name, value in of_step.items()})
    return state, sums


def test_each_member_takes_the_steps_of_its_own_batches(setup):
    """Members with 3, 1 and 2 batches, in one block of at most 4 steps."""
    one, states, keys = setup
    blocks = [[batch_of(i + 10 * s) for i in range(n)] for s, n in enumerate((3, 1, 2))]
    program = step.Program(members.make_member_step(one), size=4)
    stacked = members.stack_trees(states)
    new, sums = program(stacked, members.stack_members(blocks, NONE), jnp.stack(keys))
    parts = members.unstack_tree(new, SEEDS)
    for s, (state, key, block) in enumerate(zip(states, keys, blocks)):
        alone, sums_alone = run_alone(one, state, key, block)
        assert int(parts[s].step) == len(block)
        for first, second in zip(jax.tree.leaves(parts[s]), jax.tree.leaves(alone)):
            np.testing.assert_allclose(first, second, rtol=1e-6)
        for name, array in sums.items():
            expected = [of_step[name] for of_step in sums_alone]
            expected += [0.0] * (array.shape[0] - len(block))
            np.testing.assert_allclose(array[:, s], expected, rtol=1e-6)


def test_a_member_without_batches_keeps_every_bit(setup):
    one, states, keys = setup
    program = step.Program(members.make_member_step(one), size=2)
    blocks = [[], [batch_of(1), batch_of(2)], []]
    before = jax.tree.map(np.array, states)
    new, sums = program(
        members.stack_trees(states), members.stack_members(blocks, NONE), jnp.stack(keys)
    )
    parts = members.unstack_tree(new, SEEDS)
    for s in (0, 2):
        for first, second in zip(jax.tree.leaves(parts[s]), jax.tree.leaves(before[s])):
            np.testing.assert_array_equal(first, second)
        assert all(not np.asarray(array)[:, s].any() for array in sums.values())
    assert int(parts[1].step) == 2


def test_batches_of_members_say_who_is_live():
    blocks = [[batch_of(1)], [batch_of(2), batch_of(3)], []]
    first, second = members.stack_members(blocks, NONE)
    assert first.is_live_S.tolist() == [True, True, False]
    assert second.is_live_S.tolist() == [False, True, False]
    assert first.batch.tokens_BL.shape == (3, 2, 4)
    assert first.batch.tokens_BL[:, 0, 0].tolist() == [1, 2, 0]
    assert second.batch.weights_BL[:, 0, 0].tolist() == [0, 3, 0]


def test_stacking_and_unstacking_are_inverse(setup):
    _, states, _ = setup
    for one, two in zip(states, members.unstack_tree(members.stack_trees(states), SEEDS)):
        for first, second in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
            np.testing.assert_array_equal(first, second)


def test_each_member_has_its_own_numbers(setup):
    """A step that adds a member's number to its parameter, and one that has two of them."""
    _, states, keys = setup

    def add(numbers, state, batch, key):
        w = state.params['w'] + numbers['more'] * numbers['times']
        return state._replace(params={'w': w}), {'loss': w.sum(), 'weight': jnp.float32(1)}

    rows = [{'more': jnp.float32(10 * s), 'times': jnp.float32(2)} for s in range(SEEDS)]
    raveled = [jax.flatten_util.ravel_pytree(row) for row in rows]
    program = step.Program(members.make_member_step(add, raveled[0][1]), size=2)
    blocks = [[batch_of(0)], [batch_of(0), batch_of(0)], [batch_of(0)]]
    batches = members.stack_members(blocks, [np.asarray(row) for row, _ in raveled])
    new, _ = program(members.stack_trees(states), batches, jnp.stack(keys))
    for s, part in enumerate(members.unstack_tree(new, SEEDS)):
        expected = 1.0 + s + len(blocks[s]) * 10 * s * 2
        np.testing.assert_allclose(part.params['w'], np.full(5, expected))
