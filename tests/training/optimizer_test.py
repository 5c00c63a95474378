"""Adam and its weight decay against a loop over scalars."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fame_jax.training.optimizer import averaged_params, make_optimizer, make_schedule

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
