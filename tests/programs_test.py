"""The step, and blocks of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fame_jax import config as config_lib
from fame_jax import programs, train
from fame_jax import run as run_lib
from fame_jax.batch import Batch
from fame_jax.models.build import build, build_objective, initial

TINY = config_lib.Config(
    width=8, num_blocks=2, num_heads=2, num_experts=3, max_length=6, row_length=8, dropout=0.5
)


def two_histories():
    """7 8 9 3 and 4 5 6 in one row of eight, as batch.py draws it."""
    rows = [
        [7, 8, 9, 4, 5, 0, 0, 0],
        [0, 1, 2, 0, 1, 0, 0, 0],
        [1, 1, 1, 2, 2, 0, 0, 0],
        [8, 9, 3, 5, 6, 0, 0, 0],
    ]
    tokens, positions, segments, targets = (np.array([row], np.int32) for row in rows)
    return Batch(tokens, positions, segments, targets, (targets > 0).astype(np.float32))


def first_step(name, config=TINY, num_items=10):
    module = build(name, config, num_items)
    params = initial(module, jax.random.key(0))
    optimizer = optax.adam(1e-3)
    step = programs.make_step(functools.partial(build_objective(name, config), module), optimizer)
    return step, programs.State(jnp.int32(0), params, optimizer.init(params))


# Renew these when initialisation, dropout, the model or the loss is changed on purpose, and mark
# the change in CHANGELOG.md; `pytest tests/programs_test.py -k golden` prints the new values.
GOLDEN = {'sasrec': [8.7195, 4.5968, 11.4174], 'fame': [7.1854, 4.9403, 8.8325]}


@pytest.mark.parametrize('name', GOLDEN)
def test_golden_step(name):
    step, state = first_step(name)
    values = []
    for _ in range(3):
        state, (total, count) = step(state, two_histories(), jax.random.key(1))
        assert count == 5
        values.append(float(total / count))
    np.testing.assert_allclose(values, GOLDEN[name], rtol=1e-3)


def test_a_step_is_a_function_of_state_batch_and_key():
    step, state = first_step('fame')
    copies = [train.copy(state) for _ in range(3)]
    one, _ = step(copies[0], two_histories(), jax.random.key(1))
    two, _ = step(copies[1], two_histories(), jax.random.key(1))
    three, _ = step(copies[2], two_histories(), jax.random.key(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert np.any(np.asarray(one.params['item_table']) != np.asarray(three.params['item_table']))


def test_dropout_differs_from_step_to_step():
    """The step's number is folded into the key: without learning, the loss still changes."""
    module = build('sasrec', TINY, 10)
    params = initial(module, jax.random.key(0))
    optimizer = optax.sgd(0.0)
    step = programs.make_step(functools.partial(build_objective('sasrec', TINY), module), optimizer)
    state = programs.State(jnp.int32(0), params, optimizer.init(params))
    state, (first, _) = step(state, two_histories(), jax.random.key(1))
    state, (second, _) = step(state, two_histories(), jax.random.key(1))
    assert first != second


def test_the_padding_row_is_not_trained():
    step, state = first_step('fame')
    before = np.asarray(state.params['item_table'][0])
    state, _ = step(state, two_histories(), jax.random.key(1))
    np.testing.assert_array_equal(state.params['item_table'][0], before)


def test_the_state_is_donated():
    step, state = first_step('sasrec')
    leaf = state.params['item_table']
    step(state, two_histories(), jax.random.key(1))
    assert leaf.is_deleted()


def other_histories():
    """5 6 7 and 1 2 3 4 in one row, where `two_histories` has others."""
    rows = [[5, 6, 1, 2, 3], [0, 1, 0, 1, 2], [1, 1, 2, 2, 2], [6, 7, 2, 3, 4]]
    fields = [np.array([[*row, 0, 0, 0]], np.int32) for row in rows]
    return Batch(*fields, (fields[-1] > 0).astype(np.float32))


@pytest.mark.parametrize('name', GOLDEN)
def test_a_block_is_its_steps_bit_for_bit(name):
    step, state = first_step(name)
    batches, key = [two_histories(), other_histories(), two_histories()], jax.random.key(1)

    def train_by(size):
        program, reached, sums = programs.Program(step, size), train.copy(state), []
        for start in range(0, len(batches), size):
            block = batches[start : start + size]
            reached, sums_S2 = program(reached, block, key)
            assert not np.any(np.asarray(sums_S2)[len(block) :])
            sums += np.asarray(sums_S2)[: len(block)].tolist()
        return reached, np.array(sums)

    single = train_by(1)
    for size in (2, 3, 5):
        jax.tree.map(np.testing.assert_array_equal, single, train_by(size))
    for batch in batches:  # without a loop around it, XLA may round otherwise
        state, _ = step(state, batch, key)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), single[0], state)


def test_a_program_is_compiled_once_a_shape_and_tells_its_seconds():
    step, state = first_step('sasrec')
    program, key = programs.Program(step, 2), jax.random.key(0)
    first = program.compile(state, two_histories(), key)
    assert program.compiling() > 0
    assert program.compile(state, other_histories(), key) is first
    assert program.compiling() == 0
    twice = Batch(*(np.concatenate([field] * 2) for field in two_histories()))
    assert program.compile(state, twice, key) is not first


def test_the_outline_of_a_state_is_that_of_the_state():
    module = build('fame', TINY, 10)
    optimizer = programs.make_optimizer(1e-3, 0.999, 0.0)
    state = programs.begin(initial(module, jax.random.key(0)), optimizer, None)
    outline = programs.outline(run_lib.abstract(module), optimizer, None)
    jax.tree.map(
        lambda leaf, like: np.testing.assert_equal(
            (leaf.shape, leaf.dtype), (like.shape, like.dtype)
        ),
        state,
        outline,
    )


def test_the_donated_state_is_written_in_place():
    step, state = first_step('fame', num_items=1000)
    compiled = programs.Program(step, 4).compile(state, two_histories(), jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= size


def test_rows_that_are_to_stay_stay_even_under_weight_decay():
    """Three rows, the second is held; a leaf that is not named moves whole; a frozen one not."""
    params = {name: jnp.ones((3, 2)) for name in ('table', 'other', 'still')}
    grads = jax.tree.map(jnp.ones_like, params)
    optimizer = programs.make_optimizer(
        0.1, 0.999, 0.5, frozen=('still',), moving={'table': np.array([True, False, True])}
    )
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)
    # Adam's first step is the learning rate; decay adds rate * decay * parameter.
    step = -0.1 * (1 + 0.5)
    np.testing.assert_allclose(updates['table'], np.outer([step, 0, step], [1, 1]), rtol=1e-5)
    np.testing.assert_allclose(updates['other'], np.full((3, 2), step), rtol=1e-5)
    np.testing.assert_array_equal(updates['still'], np.zeros((3, 2)))
    moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape == (3, 2)]
    assert len(moments) == 2 * 2  # two for each leaf that moves, none for the frozen one


def test_arrays_of_an_objective_are_arguments_of_its_program():
    """Of a hundred thousand numbers one is taken; none of them is a constant."""

    def loss(params, batch, key, *, numbers):
        return params['w'] * numbers[batch.tokens_BL[0, 0]], jnp.float32(1)

    numbers = jnp.arange(100_000, dtype=jnp.float32)
    optimizer, params = optax.sgd(1.0), {'w': jnp.float32(0)}
    step = programs.make_step(jax.tree_util.Partial(loss, numbers=numbers), optimizer)
    program = programs.Program(step)
    state, key = programs.State(jnp.int32(0), params, optimizer.init(params)), jax.random.key(0)
    memory = program.compile(state, two_histories(), key).memory_analysis()
    assert memory.argument_size_in_bytes > numbers.nbytes
    state, _ = program(state, [two_histories()], key)
    assert state.params['w'] == -7
