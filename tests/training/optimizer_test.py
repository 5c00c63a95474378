"""Adam and its weight decay against a loop over scalars."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fame_jax.training.optimizer import (
    Average,
    averaged_params,
    carry_state,
    make_optimizer,
    make_schedule,
)

GRADIENTS = [0.5, -2.0, 0.25, 4.0]


def adam_loop(value, gradients, rate, decay):
    """Kingma & Ba, algorithm 1, b1 .9, b2 .999; the decay is added to the step."""
    m = v = 0.0
    values = []
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        value -= rate * (step + decay * value)
        values.append(value)
    return values


@pytest.mark.parametrize('decay', [0.0, 0.5])
@pytest.mark.parametrize('rate', [0.1, 0.01])
def test_steps_are_those_of_the_loop(rate, decay):
    optimizer = make_optimizer(rate, decay)
    params = {'w': jnp.float32(3.0)}
    state, values = optimizer.init(params), []
    for gradient in GRADIENTS:
        updates, state = optimizer.update({'w': jnp.float32(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
        values.append(float(params['w']))
    np.testing.assert_allclose(values, adam_loop(3.0, GRADIENTS, rate, decay), rtol=1e-5)


def test_a_rate_of_zero_changes_nothing():
    optimizer, params = make_optimizer(0.0), {'w': jnp.ones(2)}
    updates, _ = optimizer.update({'w': jnp.ones(2)}, optimizer.init(params), params)
    assert updates['w'].tolist() == [0, 0]


def run(optimizer, params):
    """The parameters and the optimizer's state after each step of the gradients."""
    state, steps = optimizer.init(params), []
    for gradient in GRADIENTS:
        updates, state = optimizer.update({n: jnp.float32(gradient) for n in params}, state, params)
        params = optax.apply_updates(params, updates)
        steps.append((params, state))
    return steps


def test_the_average_is_that_of_the_loop():
    params = {'w': jnp.float32(3.0), 'fixed': jnp.float32(1.0)}
    average = 3.0
    plain = run(make_optimizer(0.1, frozen=('fixed',)), params)
    averaged = run(make_optimizer(0.1, ema=0.2, frozen=('fixed',)), params)
    for step, ((now, _), (same, state)) in enumerate(zip(plain, averaged, strict=True)):
        assert now == same  # an average changes no step
        decay = min(0.2, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * float(now['w'])
        np.testing.assert_allclose(averaged_params(same, state)['w'], average, rtol=1e-6)
        # What no gradient moves may be changed between epochs, and has no average.
        assert averaged_params({**same, 'fixed': 7.0}, state)['fixed'] == 7.0


def test_without_an_average_the_parameters_are_themselves():
    params = {'w': jnp.float32(3.0)}
    assert averaged_params(params, make_optimizer(0.1).init(params)) is params


@pytest.mark.parametrize('warmup', [0, 4])
def test_schedules(warmup):
    assert make_schedule(0.5, 'constant', 0, 10) == 0.5
    rate = make_schedule(0.5, 'cosine', warmup, 12)
    grows = [0.5 * step / warmup for step in range(warmup)]
    left = 12 - warmup
    falls = [0.5 * (1 + np.cos(np.pi * step / left)) / 2 for step in range(left + 1)]
    np.testing.assert_allclose([rate(step) for step in range(13)], grows + falls, atol=1e-7)
    if warmup:
        constant = make_schedule(0.5, 'constant', warmup, 12)
        np.testing.assert_allclose([constant(s) for s in range(6)], [*grows, 0.5, 0.5], atol=1e-7)


@pytest.mark.parametrize('steps, warmup', [(0, 0), (0, 5), (1, 1), (3, 9)])
def test_a_cosine_of_few_steps_is_finite(steps, warmup):
    rate = make_schedule(0.5, 'cosine', warmup, steps)
    assert all(0 <= rate(step) <= 0.5 for step in range(12))


# An optimizer with every part: schedule, weight decay, frozen rows and parameters, an average.
WHOLE = {'ema': 0.9, 'frozen': ('fixed',), 'trained_rows': {'item_table': jnp.ones(3, bool)}}


def carried(old_options, new_options):
    """A state after two steps on a table of 3 rows, and what is carried of it to one of 5."""
    table, other = jnp.arange(6, dtype=jnp.float32).reshape(3, 2), {'fixed': jnp.ones(2)}
    old = make_optimizer(**old_options)
    params = {'item_table': table, **other}
    state = old.init(params)
    for gradient in (0.5, -2.0):
        grads = {'item_table': jnp.full((3, 2), gradient), 'fixed': jnp.zeros(2)}
        updates, state = old.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    larger = {'item_table': jnp.full((5, 2), 7.0), **other}
    return state, carry_state(state, make_optimizer(**new_options).init(larger))


def parts_of(state):
    """The states of Adam, of the average and of the schedule in an optimizer's state."""
    kinds = (optax.ScaleByAdamState, Average, optax.ScaleByScheduleState)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    return [next((n for n in nodes if isinstance(n, kind)), None) for kind in kinds]


@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_moments_are_carried_and_those_of_new_rows_are_zeros(weight_decay):
    """A cosine over the former steps is followed by a constant rate, as in an update."""
    schedule = make_schedule(0.1, 'cosine', 0, 9)
    old = {'learning_rate': schedule, 'weight_decay': weight_decay, **WHOLE}
    rows = {'trained_rows': {'item_table': jnp.ones(5, bool)}}
    new = {'learning_rate': 0.1, 'weight_decay': weight_decay, **WHOLE, **rows}
    state, grown = carried(old, new)
    (adam, average, steps), (adam_2, average_2, steps_2) = parts_of(state), parts_of(grown)
    assert adam_2.count == adam.count == average.count == average_2.count == 2
    for moment, moment_2 in ((adam.mu, adam_2.mu), (adam.nu, adam_2.nu)):
        np.testing.assert_array_equal(moment_2['item_table'][:3], moment['item_table'])
        np.testing.assert_array_equal(moment_2['item_table'][3:], np.zeros((2, 2)))
        assert np.abs(moment['item_table']).min() > 0
    # m after 0.5 and -2, and v: Kingma & Ba, algorithm 1.
    np.testing.assert_allclose(adam_2.mu['item_table'][0], 0.9 * 0.05 - 0.2, rtol=1e-5)
    np.testing.assert_allclose(adam_2.nu['item_table'][0], 0.999 * 0.00025 + 0.004, rtol=1e-5)
    np.testing.assert_array_equal(average_2.params['item_table'], np.full((5, 2), 7.0))
    assert steps.count == 2 and steps_2 is None


def test_a_schedule_starts_again():
    schedule = make_schedule(0.1, 'cosine', 0, 9)
    _, grown = carried({'learning_rate': schedule}, {'learning_rate': schedule})
    adam, average, steps = parts_of(grown)
    assert (adam.count, steps.count, average) == (2, 0, None)


def test_a_state_of_other_moments_is_refused():
    with pytest.raises(ValueError, match='other moments'):
        carried({'learning_rate': 0.1}, {'learning_rate': 0.1, 'ema': 0.9})
