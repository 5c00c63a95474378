"""Surgery: the source of each leaf, the errors, and the parts of the backbone that FAME keeps."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import assert_close, encode, make_model, new_key, parameter_shapes, rows
from flax.traverse_util import flatten_dict
from oracles import norm_loop

from fame_jax.models import fame_block, surgery
from fame_jax.models.fame import FAME

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
        'a: needs (3,), a has (2,)',
        'in the plan, but not in the new tree:',
        'q (from a)',
    ]


# From a SASRec to FAME.


def transplanted(options, **more):
    """(backbone, its parameters, FAME, its parameters after surgery)."""
    backbone, old = make_model('sasrec', num_blocks=2, **options)
    module, new = make_model('fame', seed=1, num_blocks=2, **options, **more)
    plan = module.surgery_plan(new_key(0))
    return backbone, old, module, surgery.transplant(old, new, plan)


# Options of the block that decide which parameters there are, and those that do not.
SHAPING = {
    'attention_residual': ('norm', 'slice', 'none'),
    'output_projection': ('drop', 'keep'),
    'ffn_shared': (True, False),
}
REST = {'facet_init': ('slices', 'random'), 'gate_scale': ('heads', 'one')}


def combinations(choices):
    """Every combination of the values of the options."""
    return [dict(zip(choices, values)) for values in itertools.product(*choices.values())]


@pytest.mark.parametrize(
    'positions, bias, expert_init', [('relative', True, 'random'), ('start', False, 'upcycle')]
)
def test_every_combination_of_options_fits(positions, bias, expert_init):
    shared = {'num_items': 5, 'width': 8, 'num_blocks': 1, 'num_experts': 3}
    shared |= {'positions': positions, 'attention_bias': bias, 'expert_init': expert_init}
    old = parameter_shapes(FAME(**shared).backbone_module())
    for shaping, rest in zip(combinations(SHAPING), itertools.cycle(combinations(REST))):
        module = FAME(**shared, **shaping, **rest)
        new = parameter_shapes(module)
        plan = module.surgery_plan(new_key(0))
        assert jax.eval_shape(partial(surgery.transplant, plan=plan), old, new) == new


@pytest.mark.parametrize('reading', ['', 'paper'])
def test_every_leaf_of_the_backbone_is_used_or_left_on_purpose(reading):
    """Each old leaf is filled with a number of its own, which the new tree has or has not."""
    shared = {'num_blocks': 2, 'positions': 'both'}
    module, new = make_model('fame', **shared, **FAME.readings.get(reading, {}))
    _, old = make_model('sasrec', **shared)
    leaves, tree = jax.tree.flatten(old)
    old = tree.unflatten([jnp.full_like(leaf, 100 + i) for i, leaf in enumerate(leaves)])
    plan = module.surgery_plan(new_key(0))
    result = flatten_dict(surgery.transplant(old, new, plan), sep='/')
    origin = {float(leaf.ravel()[0]): path for path, leaf in flatten_dict(old, sep='/').items()}
    actual = {}
    for path, leaf in result.items():
        number = round(float(np.mean(leaf)))
        if number >= 100:
            actual[path] = origin[number]
            assert np.abs(leaf - number).max() < 0.2
    attention, block = 'block_1/attention', 'facet_block'
    kept = ['key', 'key_bias', 'value', 'value_bias', 'distance']
    expected = {f'{block}/{name}': f'{attention}/{name}' for name in kept}
    left = {f'{attention}/{name}' for name in ('output', 'output_bias')}
    left |= {f'block_1/feed_forward/{n}/{w}' for n in ('up', 'down') for w in ('kernel', 'bias')}
    left |= {f'block_1/feed_forward_norm/{w}' for w in ('scale', 'bias')}
    if not reading:
        expected |= {f'{block}/{name}': f'{attention}/{name}' for name in ('query', 'query_bias')}
        norm = ('attention_norm/scale', 'attention_norm/bias')
        expected |= {f'{block}/{name}': f'block_1/{name}' for name in norm}
    else:
        left |= {f'{attention}/{name}' for name in ('query', 'query_bias')}
        left |= {'block_1/attention_norm/scale', 'block_1/attention_norm/bias'}
    below = {path for path in origin.values() if not path.startswith('block_1/')}
    assert actual == expected | {path: path for path in below}
    assert set(origin.values()) - set(actual.values()) == left
    fresh = {path for path in result if path.startswith('facet_block/')} - set(actual)
    before = flatten_dict(new, sep='/')
    assert all(np.array_equal(result[path], before[path]) for path in fresh)


def test_kept_options_keep_the_projection():
    _, old, _, result = transplanted({}, output_projection='keep')
    for name in ('output', 'output_bias'):
        np.testing.assert_array_equal(
            result['facet_block'][name], old['block_1']['attention'][name]
        )


@pytest.mark.parametrize('options', [{}, {'positions': 'start', 'attention_bias': False}])
def test_copies_without_noise_attend_as_the_backbone(options):
    """Below the last block nothing changes."""
    backbone, old, module, new = transplanted(options, expert_noise=0.0)
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
    _, old, _, new = transplanted({'width': 64}, num_experts=4, expert_noise=0.02)
    for name in ('query', 'query_bias'):
        copies_HN = new['facet_block'][name]
        noise_HN = np.asarray(copies_HN - old['block_1']['attention'][name][:, None])
        assert abs(noise_HN.std() - 0.02) < 0.003 and abs(noise_HN.mean()) < 0.005
        for n, m in itertools.combinations(range(4), 2):
            assert np.abs(noise_HN[:, n] - noise_HN[:, m]).max() > 0.01


def test_a_lone_expert_is_the_backbones_query():
    _, old, _, new = transplanted({}, num_experts=1)
    np.testing.assert_array_equal(
        new['facet_block']['query'][:, 0], old['block_1']['attention']['query']
    )


def test_noise_is_drawn_from_the_key():
    module, fresh = make_model('fame')
    _, old = make_model('sasrec')

    def experts(seed):
        plan = module.surgery_plan(new_key(seed))
        return np.asarray(surgery.transplant(old, fresh, plan)['facet_block']['query'])

    assert (experts(0) == experts(0)).all() and (experts(0) != experts(1)).any()


def test_surgery_keeps_the_backbones_slices():
    """What both have (attention, projection, LayerNorm) kept, and the rest made idle.

    The feed-forward nets add nothing, gates are even and facets the slices: then a head holds its
    slice of the backbone's query, normalised once more, and u is the heads side by side.
    """
    backbone, old, module, new = transplanted(
        {'similarity': 'dot'}, expert_noise=0.0, output_projection='keep'
    )
    dense = old['block_1']['feed_forward']
    dense['down'] = jax.tree.map(jnp.zeros_like, dense['down'])
    block = new['facet_block']
    block |= {
        name: jnp.zeros_like(block[name]) for name in ('down', 'down_bias', 'gate', 'gate_bias')
    }
    block['facet'] = fame_block.slice_selectors(None, (2, 8, 4))
    old['block_1']['feed_forward_norm'] = {'scale': jnp.ones(8), 'bias': jnp.zeros(8)}
    block['feed_forward_norm'] = {'scale': jnp.ones(4), 'bias': jnp.zeros(4)}
    _, _, segments_BL = fields = rows(5)
    query_BLD, _ = encode(backbone, old, *fields)
    u_BLD, _ = encode(module, new, *fields)
    for before_D, after_D in zip(query_BLD[segments_BL > 0], u_BLD[segments_BL > 0], strict=True):
        slices = [norm_loop(x_K, block['feed_forward_norm']) for x_K in np.split(before_D, 2)]
        assert_close(after_D, np.concatenate(slices))
