"""The step, and blocks of steps."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from run_fixtures import BATCH, OTHER, TINY, first_step

from fame_jax import losses
from fame_jax.batch import Batch
from fame_jax.models import registry
from fame_jax.stages.context import abstract_params
from fame_jax.training import loop, step
from fame_jax.training.optimizer import make_optimizer

# Renew these when initialisation, dropout, a model or the loss changes on purpose, and say so in
# CHANGELOG.md; `pytest tests/training/step_test.py -k golden` prints the new values.
GOLDEN = {'sasrec': [8.7195, 4.5968, 11.4174], 'fame': [7.1854, 4.9403, 8.8325]}


@pytest.mark.parametrize('name', GOLDEN)
def test_golden_step(name):
    take_step, state = first_step(name)
    values = []
    for _ in range(3):
        state, sums = take_step(state, BATCH, jax.random.key(1))
        assert sums['weight'] == 5
        values.append(float(sums['loss'] / sums['weight']))
    np.testing.assert_allclose(values, GOLDEN[name], rtol=1e-3)


def test_a_step_is_a_function_of_state_batch_and_key():
    take_step, state = first_step('fame')
    copies = [loop.copy(state) for _ in range(3)]
    one, _ = take_step(copies[0], BATCH, jax.random.key(1))
    two, _ = take_step(copies[1], BATCH, jax.random.key(1))
    three, _ = take_step(copies[2], BATCH, jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert np.any(np.asarray(one.params['item_table']) != np.asarray(three.params['item_table']))


def test_the_step_minimises_the_weighted_mean():
    """d/dw of (2 w + 0 w) / 2 is 1: the gradient of the sum over the weight, not of the sum."""

    def objective(params, batch, key):
        return 2 * params['w'], jnp.float32(2), {'twice': 2 * params['w']}

    optimizer = optax.sgd(1.0)
    take_step = step.make_step(objective, optimizer)
    params = {'w': jnp.float32(3)}
    state, sums = take_step(
        step.State(jnp.int32(0), params, optimizer.init(params)), BATCH, jax.random.key(0)
    )
    assert state.params['w'] == 3 - 1 and state.step == 1
    assert (sums['loss'], sums['weight'], sums['twice']) == (6, 2, 6)


def test_a_batch_without_weight_changes_nothing():
    take_step, state = first_step('sasrec')
    before = jax.tree.map(np.asarray, state.params)
    empty = BATCH._replace(weights_BL=BATCH.weights_BL * 0)
    state, sums = take_step(state, empty, jax.random.key(1))
    assert (sums['loss'], sums['weight']) == (0, 0)
    jax.tree.map(np.testing.assert_array_equal, before, state.params)


def test_dropout_differs_from_step_to_step():
    """The step's number is folded into the key: without learning, the loss still changes."""
    module = registry.make('sasrec', TINY, num_items=10)
    params = registry.init_params(module, jax.random.key(0))
    optimizer = optax.sgd(0.0)
    objective = functools.partial(module.objective, loss=losses.LossOptions())
    take_step = step.make_step(objective, optimizer)
    state = step.State(jnp.int32(0), params, optimizer.init(params))
    state, first = take_step(state, BATCH, jax.random.key(1))
    state, second = take_step(state, BATCH, jax.random.key(1))
    assert first['loss'] != second['loss']


def test_the_padding_row_is_not_trained():
    take_step, state = first_step('fame')
    before = np.asarray(state.params['item_table'][0])
    state, _ = take_step(state, BATCH, jax.random.key(1))
    np.testing.assert_array_equal(state.params['item_table'][0], before)


def test_the_state_is_donated():
    take_step, state = first_step('sasrec')
    leaf = state.params['item_table']
    take_step(state, BATCH, jax.random.key(1))
    assert leaf.is_deleted()


@pytest.mark.parametrize('name', GOLDEN)
def test_a_block_is_its_steps_bit_for_bit(name):
    take_step, state = first_step(name)
    batches, key = [BATCH, OTHER, BATCH], jax.random.key(1)

    def train_by(size):
        program, reached, found = step.Program(take_step, size), loop.copy(state), []
        for start in range(0, len(batches), size):
            block = batches[start : start + size]
            reached, sums = program(reached, block, key)
            assert not np.any(np.asarray(sums['loss'])[len(block) :])
            found += np.asarray(sums['loss'])[: len(block)].tolist()
        return reached, np.array(found)

    single = train_by(1)
    for size in (2, 3, 5):
        jax.tree.map(np.testing.assert_array_equal, single, train_by(size))
    for batch in batches:  # without a loop around it, XLA may round otherwise
        state, _ = take_step(state, batch, key)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), single[0], state)


def test_a_program_is_compiled_once_for_each_shape():
    take_step, state = first_step('sasrec')
    program, key = step.Program(take_step, 2), jax.random.key(0)
    program.precompile(state, BATCH, key)
    assert program.pop_compile_seconds() > 0
    program.precompile(state, OTHER, key)
    assert program.pop_compile_seconds() == 0
    twice = Batch(*(np.concatenate([field] * 2) for field in BATCH))
    program.precompile(state, twice, key)
    assert program.pop_compile_seconds() > 0


def test_tracing_is_in_the_callers_thread_and_raises_there():
    """XLA may compile elsewhere; a model's error has a stack that leads to the caller."""
    threads = []

    class Executor:
        def submit(self, function):
            threads.append('submitted')

    def objective(params, batch, key):
        threads.append(threading.current_thread().name)
        raise NotImplementedError('no such loss')

    optimizer, params = optax.sgd(1.0), {'w': jnp.float32(0)}
    program = step.Program(step.make_step(objective, optimizer))
    state = step.State(jnp.int32(0), params, optimizer.init(params))
    with pytest.raises(NotImplementedError, match='no such loss'):
        program.precompile(state, BATCH, jax.random.key(0), Executor())
    assert threads == [threading.current_thread().name]


def test_the_abstract_state_has_the_shapes_of_the_state():
    module = registry.make('fame', TINY, num_items=10)
    optimizer = make_optimizer(1e-3)
    state = step.init_state(registry.init_params(module, jax.random.key(0)), optimizer, None)
    abstract = step.abstract_state(abstract_params(module), optimizer, None)
    jax.tree.map(
        lambda leaf, like: np.testing.assert_equal(
            (leaf.shape, leaf.dtype), (like.shape, like.dtype)
        ),
        state,
        abstract,
    )


def test_the_donated_state_is_written_in_place():
    take_step, state = first_step('fame', num_items=1000)
    program = step.Program(take_step, 4)
    compiled = program.precompile(state, BATCH, jax.random.key(0)).result()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= size


def test_rows_that_are_not_trained_stay_even_under_weight_decay():
    """Row 1 of `table` stays; every row of `other` changes; `fixed` is frozen, without moments."""
    params = {name: jnp.ones((3, 2)) for name in ('table', 'other', 'fixed')}
    grads = jax.tree.map(jnp.ones_like, params)
    optimizer = make_optimizer(
        0.1, 0.5, frozen=('fixed',), trained_rows={'table': np.array([True, False, True])}
    )
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)
    # Adam's first step is the learning rate; decay adds rate * decay * parameter.
    update = -0.1 * (1 + 0.5)
    np.testing.assert_allclose(updates['table'], np.outer([update, 0, update], [1, 1]), rtol=1e-5)
    np.testing.assert_allclose(updates['other'], np.full((3, 2), update), rtol=1e-5)
    np.testing.assert_array_equal(updates['fixed'], np.zeros((3, 2)))
    moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape == (3, 2)]
    assert len(moments) == 2 * 2  # two for each trained parameter


def test_arrays_bound_to_an_objective_are_arguments_of_its_program():
    """Of 100,000 numbers one is read; none of them is a constant of the program."""

    def objective(params, batch, key, *, numbers):
        return params['w'] * numbers[batch.tokens_BL[0, 0]], jnp.float32(1), {}

    numbers = jnp.arange(100_000, dtype=jnp.float32)
    optimizer, params = optax.sgd(1.0), {'w': jnp.float32(0)}
    take_step = step.make_step(jax.tree_util.Partial(objective, numbers=numbers), optimizer)
    program = step.Program(take_step)
    state, key = step.State(jnp.int32(0), params, optimizer.init(params)), jax.random.key(0)
    compiled = program.precompile(state, BATCH, key).result()
    assert compiled.memory_analysis().argument_size_in_bytes > numbers.nbytes
    state, _ = program(state, [BATCH], key)
    assert state.params['w'] == -7
