"""Every model of the registry: shapes, padding, packing, parts of the catalogue, learning."""

import functools

import jax
import jax.numpy as jnp
import model_checks
import numpy as np
import pytest
from fixtures import encode, make_model, new_key, quick_jit, rows

from fame_jax.losses import LossOptions
from fame_jax.models import registry
from fame_jax.models.registry import MODELS

# One model of each kind; the others take minutes.
DEFAULT = ('sasrec', 'fame', 'bert4rec', 'msgifsr')


def each(names=MODELS):
    """Model names as parameters of a test; all but DEFAULT are marked slow."""
    slow = pytest.mark.slow
    return [name if name in DEFAULT else pytest.param(name, marks=slow) for name in names]


CAUSAL = [name for name, cls in MODELS.items() if cls.causal]
POSITIONS = [name for name, cls in MODELS.items() if cls.row_layout != 'prefixes']

# Options that make a small model's parts all count; each model takes those that it has.
PARTS = {'width': 16, 'num_experts': 2, 'hidden_width': 16, 'num_clusters': 4, 'num_levels': 2}
PARTS |= {'contrast_anchors': 16, 'max_unit': 2, 'max_length': 8, 'branches': 2}
# Parameters without a gradient: k-means sets them, entmax excludes queries by them, or, in a graph
# without repeated items, a softmax is over one edge.
IDLE = {'iclrec': ('intents',), 'miasrec': ('importance',), 'msgifsr': ('source', 'target')}


def options_of(name, options):
    return {key: value for key, value in options.items() if key in registry.options(MODELS[name])}


@functools.cache
def small(name):
    """A module with all its parts, and parameters as they are initialised, five times as large."""
    module = registry.make(name, options_of(name, PARTS), num_items=model_checks.V)
    params = model_checks.initialiser(module)(new_key(0))
    return module, jax.tree.map(lambda x: 5 * x, params)


@pytest.mark.parametrize('name', MODELS)
def test_facts_of_the_class(name):
    model_checks.check_facts(MODELS[name])


ODD = [
    {'width': 1, 'num_heads': 1, 'num_experts': 1, 'num_blocks': 1, 'max_length': 1, 'branches': 1},
    {
        'width': 12,
        'num_heads': 3,
        'max_unit': 3,
        'attention_bias': False,
        'branches': 2,
        'dtype': jnp.bfloat16,
    },
]


@pytest.mark.parametrize('name', each())
def test_shapes_at_odd_sizes(name):
    for options, num_items in zip(ODD, [1, 9]):
        dtype = options.get('dtype', jnp.float32)
        module = registry.make(name, options_of(name, options), num_items=num_items, dtype=dtype)
        model_checks.check_shapes(module)


@pytest.mark.parametrize('name', each())
def test_scores_of_a_part_of_the_catalogue(name):
    model_checks.check_items_in_parts(*small(name))


@pytest.mark.parametrize('name', each())
def test_other_rows_and_padding_change_no_score(name):
    model_checks.check_company(*small(name))


@pytest.mark.parametrize('name', each(CAUSAL))
def test_a_position_of_a_packed_row_is_its_prefix_alone(name):
    model_checks.check_causal(*small(name))


@pytest.mark.parametrize('name', each())
def test_rows_of_padding_are_finite(name):
    model_checks.check_padding(*small(name))


@pytest.mark.parametrize('name', each())
def test_initial_parameters_follow_the_key(name):
    model_checks.check_initialisation(small(name)[0])


@pytest.mark.parametrize('name', each())
def test_a_ring_is_learned(name):
    options = PARTS | {'dropout': 0.0, 'item_dropout': 0.0, 'mask_prob': 0.3}
    options |= {'contrast_weight': 0.01, 'intent_weight': 0.01, 'num_blocks': 1}
    module = registry.make(name, options_of(name, options), num_items=model_checks.V)
    model_checks.check_learning(module, IDLE.get(name, ()), ordered=name != 'history_mean')


@pytest.mark.slow
@pytest.mark.parametrize('name', POSITIONS)
def test_bfloat16_is_near_float32(name):
    cosine = {'similarity': 'cosine', 'temperature': 1.0}
    module, params = make_model(name, **cosine)
    fields = rows(5)
    expected_BLD, _ = encode(module, params, *fields)
    query_BLD, parts = encode(module.clone(dtype=jnp.bfloat16), params, *fields)
    assert query_BLD.dtype == jnp.bfloat16
    cosine_BL = np.sum(np.asarray(query_BLD, np.float32) * expected_BLD, axis=-1)
    cosine_BL /= np.square(expected_BLD).sum(axis=-1)
    assert cosine_BL[fields[2] > 0].min() > 0.99
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(parts))


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_a_step_with_dropout_in_bfloat16_is_finite(name):
    options = options_of(name, PARTS | {'dropout': 0.5, 'item_dropout': 0.5})
    module = registry.make(name, options, num_items=model_checks.V, dtype=jnp.bfloat16)
    batch = jax.tree.map(jnp.asarray, model_checks.ring_batch(module.row_layout))

    def total(params, key):
        total, weight, metrics = module.objective(params, batch, key, LossOptions())
        return total, (weight, metrics)

    graded = quick_jit(jax.value_and_grad(total, has_aux=True))
    (loss, (weight, metrics)), gradient = graded(small(name)[1], new_key(0))
    assert loss.dtype == weight.dtype == np.float32
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, metrics, gradient)))
