"""The table of models: modules are filled from the config, build at odd sizes, stay finite."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers_test import new_key, quick_jit, random_tree, rows
from sasrec_test import encode, make_batch, make_model

from fame_jax.config import Config, fields
from fame_jax.models import build

PADDING = np.zeros((2, 5), np.int32)


@pytest.mark.parametrize('name', build.MODELS)
def test_a_row_of_the_table_names_only_what_is_there(name):
    row = build.MODELS[name]
    assert row.backbone is None or row.backbone in build.MODELS
    assert set(row.options) <= set(fields())
    assert name in fields()['model'].metadata['choices']


@pytest.mark.parametrize('name', build.MODELS)
def test_every_field_of_a_module_is_the_configs(name):
    config = Config(width=24, num_heads=3, num_experts=5, dropout=0.25, temperature=0.5)
    module = build.build(name, config, num_items=7)
    own = {field.name for field in dataclasses.fields(module)} - {'parent', 'name'}
    assert own - set(fields()) == {'num_items', 'mesh'}
    assert (module.num_items, module.dtype) == (7, jnp.float32)
    for field in own - {'num_items', 'dtype', 'mesh'}:
        assert getattr(module, field) == getattr(config, field)


ODD = [
    {'width': 1, 'num_heads': 1, 'max_length': 1},
    {'width': 6, 'num_heads': 6, 'num_experts': 1, 'num_blocks': 1},
    {'width': 12, 'num_heads': 3, 'num_experts': 7, 'num_blocks': 4, 'positions': 'start'},
    {'inner_multiple': 1, 'positions': 'both', 'tied_items': False, 'attention_bias': False},
    {'attention_residual': 'none', 'output_projection': 'keep', 'ffn_shared': False},
    {'dtype': 'bfloat16', 'facet_init': 'random', 'gate_scale': 'one', 'activation': 'relu'},
]


@pytest.mark.parametrize('num_items', [1, 9])
@pytest.mark.parametrize('name', build.MODELS)
def test_every_model_builds_at_odd_sizes(name, num_items):
    for options in ODD:
        config = Config(**options)
        module = build.build(name, config, num_items)

        def all_of_it(module=module):
            params = build.initial(module, new_key(0))
            key = {'dropout': new_key(1)}
            call = partial(module.apply, {'params': params}, PADDING, PADDING, PADDING)
            query_BLD, item_VD = call(train=True, rngs=key, method='query_and_items')
            return params, query_BLD, item_VD, call(last=True)[0]

        params, query_BLD, item_VD, last_B1D = jax.eval_shape(all_of_it)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
        wide = item_VD.shape[1]
        assert wide in (config.width, config.width + 1)  # a bias or a level's share beside it
        assert item_VD.shape == (num_items + 1, wide)
        assert item_VD.dtype == jnp.dtype(config.dtype)
        assert query_BLD.dtype == last_B1D.dtype
        if build.MODELS[name].layout == 'prefixes':  # queries of the row, not of its positions
            assert query_BLD.shape == last_B1D.shape and last_B1D.shape[::2] == (2, wide)
        else:
            assert (query_BLD.shape, last_B1D.shape) == ((2, 5, wide), (2, 1, wide))
            assert query_BLD.dtype == item_VD.dtype


@pytest.mark.parametrize(
    'name', [name for name, row in build.MODELS.items() if row.layout != 'prefixes']
)
def test_bfloat16_is_near_float32(name):
    fields = rows(5)
    module, params = make_model(name, similarity='cosine', temperature=1.0)
    half = module.clone(dtype=jnp.dtype('bfloat16'))
    expected_BLD, _ = encode(module, params, *fields)
    query_BLD, parts = encode(half, params, *fields)
    assert query_BLD.dtype == jnp.bfloat16
    real_BL = fields[2] > 0
    cosine_BL = np.sum(np.asarray(query_BLD, np.float32) * expected_BLD, axis=-1)
    assert cosine_BL[real_BL].min() > 0.998
    for leaf in jax.tree.leaves(parts):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


@pytest.mark.parametrize('name', build.MODELS)
def test_rows_of_padding_are_finite(name):
    module, params = make_model(name, positions='both')

    def total(params):
        query_BLD, parts = module.apply({'params': params}, PADDING, PADDING, PADDING)
        return jnp.sum(query_BLD), (query_BLD, parts)

    gradient, seen = quick_jit(jax.grad(total, has_aux=True))(params)
    for leaf in jax.tree.leaves((gradient, seen)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize('name', build.MODELS)
def test_initial_parameters_follow_the_key(name):
    module = build.build(name, Config(width=8, num_blocks=1), num_items=5)
    draw = quick_jit(partial(build.initial, module))
    one, same, other = (draw(new_key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert np.any(one['item_table'] != other['item_table'])


@pytest.mark.parametrize(
    'num_items, backend, tokens',
    [(11_924, 'cpu', 128), (2**18, 'gpu', 2**10), (2**20, 'gpu', 2**8), (2**30, 'gpu', 1)],
)
def test_tokens_at_a_time_go_by_device_and_memory(num_items, backend, tokens):
    assert build.tokens_at_a_time(num_items, backend) == tokens


def test_chunks_that_are_asked_for_are_taken_whatever_the_device():
    def chunk(**options):
        heard = []
        row = build.MODELS['sasrec']._replace(objective=lambda *_, **o: heard.append(o))
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(build.MODELS, 'sasrec', row)
            build.build_objective('sasrec', Config(**options))(build.build('sasrec', Config(), 9))
        return heard[0]['chunk_tokens']

    assert [chunk(), chunk(chunk_tokens=0), chunk(chunk_tokens=7)] == [128, 0, 7]


@pytest.mark.parametrize('loss, options', [('ce', {'chunk_items': 4}), ('bce', {})])
def test_the_objective_takes_its_options_from_the_config(loss, options):
    config = Config(width=8, num_blocks=1, loss=loss, **options)
    module = build.build('sasrec', config, num_items=12)
    params = random_tree(jax.eval_shape(partial(build.initial, module), new_key(0)))
    batch = make_batch({name: [[1, 2]] for name in ('tokens', 'positions', 'segments', 'targets')})
    objective = build.build_objective('sasrec', config)
    total, number = quick_jit(partial(objective, module))(params, batch, new_key(0))
    assert np.isfinite(total) and number == 2
