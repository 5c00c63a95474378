"""DenseRec's two paths: which items take the map of their text, and what reaches the map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import BATCH, assert_close, quick_jit

from fame_jax.losses import LossOptions
from fame_jax.models import registry, text_path

V, D, E = 12, 8, 5
ACTIONS = np.array([9, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4])
WITHOUT_TEXT = (2, 7)


def make_texts():
    text_VE = np.random.default_rng(0).normal(size=(V + 1, E)).astype(np.float32)
    text_VE[[0, *WITHOUT_TEXT]] = 0
    return text_VE


def make_params(seed=0):
    draw = np.random.default_rng(seed)
    return {
        'item_table': jnp.asarray(draw.normal(size=(V + 1, D)), jnp.float32),
        'text_path': {
            'kernel': jnp.asarray(draw.normal(size=(E, D)), jnp.float32),
            'bias': jnp.asarray(draw.normal(size=D), jnp.float32),
        },
        'other': jnp.ones(3),
    }


def make_constants(below=2, rows=V + 1):
    return text_path.items(make_texts(), ACTIONS, below, rows)


def table_loop(params, takes_text):
    """Row by row: W of the unit text vector plus b for items that take it, else the row."""
    table = np.array(params['item_table'])
    kernel, bias = (np.asarray(params['text_path'][name]) for name in ('kernel', 'bias'))
    for v in takes_text:
        unit_E = make_texts()[v] / np.sqrt(sum(x * x for x in make_texts()[v]))
        table[v] = [sum(unit_E[e] * kernel[e, d] for e in range(E)) + bias[d] for d in range(D)]
    return table


@pytest.mark.parametrize('below', [0, 1, 2, 100])
def test_folded_rows_are_those_of_items_with_a_text_and_few_actions(below):
    params = make_params()
    folded = text_path.fold(params, make_constants(below))
    seldom = [v for v in range(1, V + 1) if ACTIONS[v] < below and v not in WITHOUT_TEXT]
    assert_close(folded['item_table'], table_loop(params, seldom))
    assert sorted(folded) == ['item_table', 'other']
    kept = [v for v in range(V + 1) if v not in seldom]
    np.testing.assert_array_equal(folded['item_table'][kept, :], params['item_table'][kept, :])


def test_a_step_draws_items_with_the_given_share():
    """Items of few actions always take the text path, those without a text never."""
    params, constants = make_params(), make_constants(below=2)
    mix = jax.jit(functools.partial(text_path.mix, params, constants))
    changed_RV = np.array(
        [
            np.any(mix(jax.random.key(r), 0.3)['item_table'] != params['item_table'], axis=1)
            for r in range(300)
        ]
    )
    share_V = changed_RV.mean(axis=0)
    for v in range(V + 1):
        if v == 0 or v in WITHOUT_TEXT:
            assert share_V[v] == 0
        elif ACTIONS[v] < 2:
            assert share_V[v] == 1
        else:
            assert abs(share_V[v] - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 300)


def test_without_a_share_and_a_limit_the_table_is_unchanged():
    params = make_params()
    for mixed in (
        text_path.mix(params, make_constants(below=0), jax.random.key(0), 0.0),
        text_path.fold(params, make_constants(below=0)),
    ):
        np.testing.assert_array_equal(mixed['item_table'], params['item_table'])


def test_padding_rows_of_a_table_on_several_devices():
    constants = make_constants(rows=V + 4)
    assert {len(a) for a in constants.values()} == {V + 4}
    assert not constants['has_text'][V + 1 :].any() and not constants['always'][V + 1 :].any()


def make_objective(name, constants, share=0.0, **options):
    """The module with a map, and its objective as a run trains it."""
    module = registry.make(
        name, {'width': D, 'num_blocks': 1, 'max_length': 8, 'dropout': 0.0, **options}, num_items=V
    ).clone(text_width=E)
    of_model = functools.partial(module.objective, loss=LossOptions('ce', chunk_tokens=0))
    return module, functools.partial(
        text_path.objective, of_model=of_model, constants=constants, share=share
    )


def init(module):
    params = registry.init_params(module, jax.random.key(1))
    return params | {'text_path': make_params()['text_path']}


@pytest.mark.parametrize('name', ['fame', 'bert4rec'])  # by rows of the table, and by vectors
def test_training_reads_the_table_that_is_served(name):
    """The objective of the mixed parameters is the model's objective of the folded ones."""
    constants, batch = make_constants(below=3), BATCH
    module, objective = make_objective(name, constants)
    params, key = init(module), jax.random.key(2)
    folded = text_path.fold(params, constants)
    loss = LossOptions('ce', chunk_tokens=0)

    @quick_jit
    def both(batch):
        return objective(params, batch, key), module.objective(folded, batch, key, loss)

    actual, expected = both(batch)
    assert_close(actual[0], expected[0], 1e-6)


@pytest.mark.parametrize('below', [0, 2])
def test_a_gradient_reaches_the_map_only_through_items_that_take_it(below):
    """And the rows of those items have none."""
    constants, batch = make_constants(below=below), BATCH
    module, objective = make_objective('sasrec', constants)
    params = init(module)
    gradient = quick_jit(jax.grad(lambda p: objective(p, batch, jax.random.key(0))[0]))(params)
    takes_V = np.asarray(constants['always'])
    moved_V = np.any(np.asarray(gradient['item_table']) != 0, axis=1)
    assert not moved_V[takes_V].any() and moved_V[1 : V + 1][~takes_V[1:]].all()
    for leaf in jax.tree.leaves(gradient['text_path']):
        assert bool(np.any(leaf != 0)) == (below > 0)


def test_the_gradient_of_the_map_is_the_sum_over_its_items():
    """dL/dW = sum_i e_i (dL/dv_i)^T over the items that take the text path, and dL/db theirs."""
    constants, batch = make_constants(below=3), BATCH
    module, objective = make_objective('sasrec', constants)
    params, key = init(module), jax.random.key(0)
    gradient = quick_jit(jax.grad(lambda p: objective(p, batch, key)[0]))(params)['text_path']
    loss = LossOptions('ce', chunk_tokens=0)
    of_table = quick_jit(jax.grad(lambda p: module.objective(p, batch, key, loss)[0]))
    row_VD = of_table(text_path.fold(params, constants))['item_table']
    kernel, bias = np.zeros((E, D)), np.zeros(D)
    for v in np.flatnonzero(constants['always']):
        kernel += np.outer(constants['text_vectors'][v], row_VD[v])
        bias += row_VD[v]
    assert_close(gradient['kernel'], kernel)
    assert_close(gradient['bias'], bias)


def test_the_draw_does_not_repeat_a_key_of_the_model():
    key = jax.random.key(0)
    own = jax.random.key_data(jax.random.fold_in(key, text_path.DRAW)).tolist()
    assert own not in jax.random.key_data(jax.random.split(key, 64)).tolist()


def test_the_map_is_the_only_new_parameter():
    """The others have the initial values that they have without it."""
    plain = registry.make('sasrec', {'width': D, 'max_length': 8}, num_items=V)
    old = registry.init_params(plain, jax.random.key(3))
    new = registry.init_params(plain.clone(text_width=E), jax.random.key(3))
    path = new.pop('text_path')
    assert jax.tree.map(jnp.shape, path) == {'kernel': (E, D), 'bias': (D,)}
    jax.tree.map(np.testing.assert_array_equal, new, old)
