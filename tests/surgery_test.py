"""Surgery: what goes where, what errors say, and what FAME keeps of its backbone."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from layers_test import assert_close, new_key, norm_loop, rows
from sasrec_test import encode, make_model

from fame_jax import config, surgery
from fame_jax.models import build, facet_block, fame

OLD = {'a': jnp.array([1.0, 2]), 'b': {'c': jnp.array([3.0])}}


def test_leaves_go_where_the_plan_says():
    new = {'a': jnp.zeros(2), 'd': {'e': jnp.zeros(1), 'f': jnp.full(2, 9.0)}}
    plan = surgery.Plan(copy={'d/e': 'b/c'}, transform={'d/e': lambda x: -x}, fresh='d/')
    result = surgery.transplant(OLD, new, plan)
    assert jax.tree.map(lambda x: x.tolist(), result) == {
        'a': [1, 2],
        'd': {'e': [-3], 'f': [9, 9]},
    }


def test_a_leaf_can_be_used_twice_or_left_behind():
    new = {'a': jnp.zeros(2), 'g': jnp.zeros(2)}
    result = surgery.transplant(OLD, new, surgery.Plan(copy={'g': 'a'}, dropped='b/'))
    assert result['g'].tolist() == result['a'].tolist() == [1, 2]


def test_a_leaf_takes_the_dtype_of_the_new_tree():
    new = {'a': jnp.zeros(2, jnp.bfloat16), 'b': {'c': jnp.zeros(1)}}
    result = surgery.transplant(OLD, new, surgery.Plan())
    assert result['a'].dtype == jnp.bfloat16


FAULTS = {
    'missing': (
        {'a': jnp.zeros(2), 'b': {'c': jnp.zeros(1)}, 'z': jnp.zeros(1)},
        surgery.Plan(),
        ['without a source', 'z'],
    ),
    'left': (
        {'a': jnp.zeros(2)},
        surgery.Plan(),
        ['without a use', 'b/c'],
    ),
    'missing and left': (
        {'a': jnp.zeros(2), 'z': jnp.zeros(1)},
        surgery.Plan(),
        ['without a source', 'z', 'without a use', 'b/c'],
    ),
    'renamed without a plan': (
        {'a': jnp.zeros(2), 'b': {'d': jnp.zeros(1)}},
        surgery.Plan(),
        ['without a source', 'b/d', 'without a use', 'b/c'],
    ),
    'wrong shape': (
        {'a': jnp.zeros(5), 'b': {'c': jnp.zeros(1)}},
        surgery.Plan(),
        ['shape', 'a', '(5,)', '(2,)'],
    ),
    'wrong shape after a transform': (
        {'a': jnp.zeros(2), 'b': {'c': jnp.zeros(1)}},
        surgery.Plan(transform={'a': lambda x: x[:1]}),
        ['shape', 'a', '(2,)', '(1,)'],
    ),
    'the plan copies what is not there': (
        {'a': jnp.zeros(2), 'b': {'c': jnp.zeros(1)}, 'n': {'e': jnp.zeros(1)}},
        surgery.Plan(copy={'n/e': 'b/lost'}, fresh='n/'),
        ['without a source', 'n/e', 'b/lost'],
    ),
    'the plan fills what is not there': (
        {'a': jnp.zeros(2), 'b': {'c': jnp.zeros(1)}},
        surgery.Plan(copy={'nowhere': 'a'}),
        ['nowhere'],
    ),
    'the plan transforms what is not there': (
        {'a': jnp.zeros(2), 'b': {'c': jnp.zeros(1)}},
        surgery.Plan(transform={'nowhere': lambda x: x}),
        ['nowhere'],
    ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_an_error_names_what_on_either_side(fault):
    new, plan, words = FAULTS[fault]
    with pytest.raises(surgery.SurgeryError) as error:
        surgery.transplant(OLD, new, plan)
    for word in words:
        assert word in str(error.value)


def test_an_error_prints_all_differences_at_once():
    new = {'a': jnp.zeros(3), 'x': jnp.zeros(1), 'y': jnp.zeros(1)}
    with pytest.raises(surgery.SurgeryError) as error:
        surgery.transplant(OLD, new, surgery.Plan(copy={'y': 'gone', 'q': 'a'}))
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert lines[1:] == [
        'in the new tree, without a source:',
        'x (from x)',
        'y (from gone)',
        'in the pre-trained tree, without a use:',
        'b/c',
        'of another shape:',
        'a: wants (3,), a gives (2,)',
        'in the plan, but not in the new tree:',
        'q (from a)',
    ]


# From a SASRec to FAME.


def operate(options, expert_init='upcycle', noise=0.02, **more):
    """(backbone, its parameters, FAME, parameters after surgery, parameters before)."""
    backbone, old = make_model('sasrec', num_blocks=2, **options)
    module, new = make_model('fame', seed=1, num_blocks=2, **options, **more)
    plan = fame.plan(module, new_key(0), expert_init, noise)
    return backbone, old, module, surgery.transplant(old, new, plan), new


def shapes(module):
    return jax.eval_shape(partial(build.initial, module), new_key(0))


READINGS = {
    'warm': config.Config(),
    'paper': config.Config(**config.PAPER_READING),
}


# Options of the block that decide which parameters there are, and those that do not.
SHAPING = ('attention_residual', 'output_projection', 'ffn_shared')
REST = ('facet_init', 'facet_learned', 'gate_scale')


def choices(*names):
    """Every combination of the values that the named options have."""
    about = config.fields()
    values = [about[name].metadata.get('choices') or (True, False) for name in names]
    return [dict(zip(names, chosen)) for chosen in itertools.product(*values)]


@pytest.mark.parametrize('positions, bias', [('relative', True), ('start', False)])
def test_every_combination_of_options_fits(positions, bias):
    options = {'width': 8, 'num_experts': 3, 'num_blocks': 1}
    options |= {'positions': positions, 'attention_bias': bias}
    old = shapes(build.build('sasrec', config.Config(**options), 5))
    for shaping, rest in zip(choices(*SHAPING), itertools.cycle(choices(*REST))):
        module = build.build('fame', config.Config(**options, **shaping, **rest), 5)
        new = shapes(module)
        for expert_init in ('upcycle', 'random'):
            plan = fame.plan(module, new_key(0), expert_init, 0.02)
            result = jax.eval_shape(partial(surgery.transplant, plan=plan), old, new)
            assert result == new


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('reading', READINGS)
def test_every_leaf_of_the_backbone_is_used_or_left_on_purpose(reading, tied):
    """Each old leaf is a number of its own, found again in the new tree or not."""
    names = [name for name in config.PAPER_READING if name != 'expert_init']
    options = {name: getattr(READINGS[reading], name) for name in names}
    shared = {'num_blocks': 2, 'positions': 'both', 'tied_items': tied}
    module, new = make_model('fame', **shared, **options)
    _, old = make_model('sasrec', **shared)
    leaves, tree = jax.tree.flatten(old)
    old = tree.unflatten([jnp.full_like(leaf, 100 + i) for i, leaf in enumerate(leaves)])
    plan = fame.plan(module, new_key(0), READINGS[reading].expert_init, 0.02)
    result = flatten_dict(surgery.transplant(old, new, plan), sep='/')
    origin = {float(leaf.ravel()[0]): path for path, leaf in flatten_dict(old, sep='/').items()}
    found = {}
    for path, leaf in result.items():
        number = round(float(np.mean(leaf)))
        if number >= 100:
            found[path] = origin[number]
            assert np.abs(leaf - number).max() < 0.2
    attention, block = 'block_1/attention', 'facet_block'
    kept = ['key', 'key_bias', 'value', 'value_bias', 'distance']
    expected = {f'{block}/{name}': f'{attention}/{name}' for name in kept}
    left = {f'{attention}/{name}' for name in ('output', 'output_bias')}
    left |= {f'block_1/feed_forward/{n}/{w}' for n in ('up', 'down') for w in ('kernel', 'bias')}
    left |= {f'block_1/feed_forward_norm/{w}' for w in ('scale', 'bias')}
    if reading == 'warm':
        expected |= {f'{block}/{name}': f'{attention}/{name}' for name in ('query', 'query_bias')}
        norm = ('attention_norm/scale', 'attention_norm/bias')
        expected |= {f'{block}/{name}': f'block_1/{name}' for name in norm}
    else:
        left |= {f'{attention}/{name}' for name in ('query', 'query_bias')}
        left |= {'block_1/attention_norm/scale', 'block_1/attention_norm/bias'}
    below = {path for path in origin.values() if not path.startswith('block_1/')}
    assert ('output_table' in below) == (not tied)
    assert found == expected | {path: path for path in below}
    assert set(origin.values()) - set(found.values()) == left
    fresh = {path for path in result if path.startswith('facet_block/')} - set(found)
    before = flatten_dict(new, sep='/')
    assert all(np.array_equal(result[path], before[path]) for path in fresh)


def test_kept_options_keep_the_projection():
    _, old, _, result, _ = operate({}, output_projection='keep')
    for name in ('output', 'output_bias'):
        np.testing.assert_array_equal(
            result['facet_block'][name], old['block_1']['attention'][name]
        )


@pytest.mark.parametrize('options', [{}, {'positions': 'start', 'attention_bias': False}])
def test_copies_without_noise_attend_as_the_backbone(options):
    """And below the last block nothing changes, whatever the new parts hold."""
    backbone, old, module, new, _ = operate(options, noise=0.0)
    fields = rows(5)
    _, parts = encode(backbone, old, *fields)
    _, new_parts = encode(module, new, *fields)
    attention_BHNQS = new_parts['facet_block']['attention_BHNQS']
    assert attention_BHNQS.shape == (4, 2, 3, 5, 5)
    for n in range(3):
        assert_close(attention_BHNQS[:, :, n : n + 1], parts['block_1']['attention_BHNQS'], 1e-6)
    np.testing.assert_array_equal(
        new_parts['block_0']['attention_BHNQS'], parts['block_0']['attention_BHNQS']
    )
    for name in set(old) - {'block_1'}:
        jax.tree.map(np.testing.assert_array_equal, new[name], old[name])


def test_noise_sets_experts_apart():
    options = {'width': 64, 'num_heads': 2, 'num_experts': 4}
    _, old, _, new, _ = operate(options, noise=0.02)
    for name in ('query', 'query_bias'):
        copies_HN = new['facet_block'][name]
        noise_HN = np.asarray(copies_HN - old['block_1']['attention'][name][:, None])
        assert abs(noise_HN.std() - 0.02) < 0.003 and abs(noise_HN.mean()) < 0.005
        for n, m in itertools.combinations(range(4), 2):
            assert np.abs(noise_HN[:, n] - noise_HN[:, m]).max() > 0.01


def test_a_lone_expert_is_the_backbones_query():
    _, old, _, new, _ = operate({}, num_experts=1)
    np.testing.assert_array_equal(
        new['facet_block']['query'][:, 0], old['block_1']['attention']['query']
    )


def test_noise_is_drawn_from_the_key():
    module, fresh = make_model('fame')
    _, old = make_model('sasrec')

    def experts(seed):
        plan = fame.plan(module, new_key(seed), 'upcycle', 0.02)
        return np.asarray(surgery.transplant(old, fresh, plan)['facet_block']['query'])

    assert (experts(0) == experts(0)).all() and (experts(0) != experts(1)).any()


def test_surgery_keeps_the_backbones_slices():
    """What both have (attention, projection, LayerNorm) kept, and the rest made idle.

    The feed-forward nets add nothing, gates are even and facets the slices: then a head holds its
    slice of the backbone's query, normalised once more, and u is the heads side by side.
    """
    backbone, old, module, new, _ = operate(
        {'similarity': 'dot'}, noise=0.0, output_projection='keep'
    )
    dense = old['block_1']['feed_forward']
    dense['down'] = jax.tree.map(jnp.zeros_like, dense['down'])
    block = new['facet_block']
    block |= {
        name: jnp.zeros_like(block[name]) for name in ('down', 'down_bias', 'gate', 'gate_bias')
    }
    block['facet'] = facet_block.slice_selectors(None, (2, 8, 4))
    old['block_1']['feed_forward_norm'] = {'scale': jnp.ones(8), 'bias': jnp.zeros(8)}
    block['feed_forward_norm'] = {'scale': jnp.ones(4), 'bias': jnp.zeros(4)}
    _, _, segments_BL = fields = rows(5)
    query_BLD, _ = encode(backbone, old, *fields)
    u_BLD, _ = encode(module, new, *fields)
    for before_D, after_D in zip(query_BLD[segments_BL > 0], u_BLD[segments_BL > 0], strict=True):
        slices = [norm_loop(x_K, block['feed_forward_norm']) for x_K in np.split(before_D, 2)]
        assert_close(after_D, np.concatenate(slices))
