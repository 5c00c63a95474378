"""FAME against explicit float64 loops of equations 7 to 17, and its special cases."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import (
    BATCH,
    assert_close,
    assert_depends_on_prefix_alone,
    assert_packing_changes_nothing,
    compile_gradient,
    compile_objective,
    count_parameters,
    encode,
    float64,
    make_fame_block,
    make_model,
    new_key,
    quick_jit,
    rows,
)
from oracles import block_loop, facet_loop, norm_loop

from fame_jax.models import fame_block, layers


def run(block, params, x_BLD, mask_BLL, train=False, last=False, **options):
    f = partial(block.apply, train=train, last=last, **options)
    return quick_jit(f)(params, x_BLD, mask_BLL)


OPTIONS = [
    {},
    {'attention_residual': 'slice'},
    {'attention_residual': 'none'},
    {'attention_residual': 'norm', 'output_projection': 'keep', 'gate_scale': 'one'},
    {'attention_residual': 'slice', 'output_projection': 'keep', 'ffn_shared': False},
    {'attention_residual': 'none', 'output_projection': 'keep', 'positions': 'start'},
    {
        'ffn_shared': False,
        'gate_scale': 'one',
        'attention_bias': False,
        'attention_scale': 'model',
    },
    {'active_experts': 2},
    {'routing': 'inputs'},
    {'routing': 'inputs', 'active_experts': 2},
    {'routing': 'inputs', 'active_experts': 1, 'positions': 'start'},
]
CASES = [
    *((5, {'num_heads': 2, 'num_experts': 3, **options}) for options in OPTIONS),
    (1, {'num_heads': 1, 'num_experts': 1}),
    (5, {'num_heads': 1, 'num_experts': 1, 'attention_residual': 'none'}),
    (2, {'num_heads': 2, 'num_experts': 1, 'gate_scale': 'one'}),
    (2, {'num_heads': 4, 'num_experts': 2, 'ffn_shared': False}),
    (5, {'num_heads': 4, 'num_experts': 2, 'max_length': 9, 'output_projection': 'keep'}),
]


@pytest.mark.parametrize('length, options', CASES)
def test_fame_block_matches_the_loop(length, options):
    block, params, x_BLD, mask_BLL, segments_BL, model = make_fame_block(length, **options)
    u_BLD, parts = run(block, params, x_BLD, mask_BLL)
    p = float64(params['params'])
    for b, segments_L in enumerate(segments_BL):
        real = segments_L > 0
        u_LD, expected = facet_loop(float64(x_BLD[b]), segments_L, p, model)
        assert_close(
            parts['attention_BHNQS'][b][:, :, real], expected['attention_HNQS'][:, :, real]
        )
        assert_close(parts['router_BLHN'][b][real], expected['router_LHN'][real])
        assert_close(parts['heads_BLHK'][b][real], expected['heads_LHK'][real])
        assert_close(parts['gate_BLH'][b][real], expected['gate_LH'][real])
        assert_close(u_BLD[b][real], u_LD[real])


@pytest.mark.parametrize('offset', [0.0, 10.0])
def test_a_narrow_head_keeps_its_precision(offset):
    """Two numbers close to each other, far from zero: LayerNorm has only their difference."""
    block, params, x_BLD, mask_BLL, *_ = make_fame_block(1, num_heads=4, attention_residual='slice')
    x_BLD = x_BLD + np.float32(offset)
    p = params['params']
    p |= {name: 0 * p[name] for name in ('value', 'value_bias', 'down', 'down_bias')}
    _, parts = run(block, {'params': p}, x_BLD, mask_BLL)
    for x_K, actual_K in zip(x_BLD.reshape(-1, 2), parts['heads_BLHK'].reshape(-1, 2)):
        assert_close(actual_K, norm_loop(float64(x_K), p['feed_forward_norm']))


def test_fame_block_computes_the_last_column_alone():
    block, params, x_BLD, mask_BLL, *_ = make_fame_block(5, output_projection='keep')
    full_BLD, full = run(block, params, x_BLD, mask_BLL)
    last_B1D, last = run(block, params, x_BLD, mask_BLL, last=True)
    assert_close(last_B1D, full_BLD[:, -1:])
    assert last['attention_BHNQS'].shape == (4, 2, 3, 1, 5)
    for name in ('router_BLHN', 'heads_BLHK', 'gate_BLH'):
        assert_close(last[name], full[name][:, -1:])


@pytest.mark.parametrize('residual, projection', [('norm', 'keep'), ('none', 'drop')])
def test_dropping_everything_leaves_residuals_and_gates(residual, projection):
    """Dropout is on attention weights, on the sublayer before the residual, and on FFN'."""
    options = {'attention_residual': residual, 'output_projection': projection}
    block, params, x_BLD, mask_BLL, segments_BL, model = make_fame_block(2, dropout=1.0, **options)
    u_BLD, _ = run(block, params, x_BLD, mask_BLL, train=True, rngs={'dropout': new_key(0)})
    p = float64(params['params'])
    for name in ('value', 'value_bias', 'output_bias', 'down', 'down_bias'):
        p[name] = 0 * p.get(name, 0)
    u_LD, _ = facet_loop(float64(x_BLD[1]), segments_BL[1], p, model)
    assert_close(u_BLD[1], u_LD)


def test_slice_selectors_give_head_h_slice_h_of_the_item():
    w_HDK = fame_block.slice_selectors(None, (3, 6, 2))
    item_D = np.array([1.0, 2, 3, 4, 5, 6])
    assert [(item_D @ w_DK).tolist() for w_DK in w_HDK] == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize('facet_init, same', [('slices', True), ('random', False)])
def test_facets_start_as_configured(facet_init, same):
    block, _, x_BLD, mask_BLL, *_ = make_fame_block(1, facet_init=facet_init)
    init = quick_jit(partial(block.init, train=False, last=False))
    w_HDK = init(new_key(0), x_BLD, mask_BLL)['params']['facet']
    eye_HDK = np.stack([np.eye(8)[:, :4], np.eye(8)[:, 4:]])
    assert np.array_equal(w_HDK, eye_HDK) == same
    assert same or 0.01 < np.asarray(w_HDK).std() < 0.03


# The whole model.


def fame_loop(p, tokens_L, positions_L, segments_L, module):
    """Every item's score at every position of a row, [L, V + 1]: eqs. 8, 9, 11, then the cosine."""
    x_LD = np.array([p['item_table'][token] for token in tokens_L])
    if module.positions != 'relative':
        x_LD += np.array([p['position_table'][position] for position in positions_L])
    x_LD = np.array([norm_loop(x_D, p['input_norm']) for x_D in x_LD])
    for n in range(module.num_blocks - 1):
        x_LD, _ = block_loop(x_LD, segments_L, p[f'block_{n}'], module.attention_scale)
    facet = p['facet_block']
    assert ('distance' in facet) == (module.positions != 'start')
    u_LD, parts = facet_loop(x_LD, segments_L, facet, module)
    table_VD = p['item_table']
    score_LV = np.zeros((len(tokens_L), len(table_VD)))
    for i, v in np.ndindex(*score_LV.shape):
        for h in range(module.num_heads):
            item_K = table_VD[v] @ facet['facet'][h]  # (9)
            own = item_K @ parts['heads_LHK'][i, h]  # (8)
            score_LV[i, v] += parts['gate_LH'][i, h] * own  # (11)
        if module.similarity == 'cosine' and segments_L[i]:
            lengths = np.linalg.norm(u_LD[i]) * np.linalg.norm(table_VD[v])
            score_LV[i, v] /= lengths * module.temperature
    return score_LV


PAPER = {
    'attention_residual': 'none',
    'gate_scale': 'one',
    'attention_bias': False,
    'similarity': 'dot',
    'positions': 'start',
}
MODELS = [
    (1, {'num_heads': 1, 'num_experts': 1}),
    (2, {'num_heads': 2, 'num_experts': 1, 'positions': 'both', 'similarity': 'dot'}),
    (5, PAPER),
    (5, {'positions': 'relative', 'max_length': 3, 'num_blocks': 2}),
    (5, {'num_heads': 4, 'num_experts': 2, 'attention_scale': 'model'}),
    (5, {'routing': 'inputs', 'active_experts': 2, 'num_blocks': 2}),
]


@pytest.mark.parametrize('length, options', MODELS)
def test_scores_match_the_loop(length, options):
    module, params = make_model('fame', **options)
    fields = rows(length)
    query_BLD, item_VD, _ = encode(module, params, *fields, method='forward')
    score_BLV = np.einsum('BLD,VD->BLV', query_BLD, item_VD)
    p = float64(params)
    for score_LV, tokens_L, positions_L, segments_L in zip(score_BLV, *fields, strict=True):
        expected_LV = fame_loop(p, tokens_L, positions_L, segments_L, module)
        assert_close(score_LV[segments_L > 0], expected_LV[segments_L > 0], 2e-5)


# Special cases.


def test_one_expert_is_plain_attention():
    block, params, x_BLD, mask_BLL, *_ = make_fame_block(5, num_experts=1)
    _, parts = run(block, params, x_BLD, mask_BLL)
    assert (np.asarray(parts['router_BLHN']) == 1).all()
    own = {name: params['params'][name] for name in ('key', 'key_bias', 'distance')}
    own |= {name: params['params'][name] for name in ('value', 'value_bias')}
    own |= {name: params['params'][name][:, 0] for name in ('query', 'query_bias')}
    own |= {'output': jnp.zeros((2, 4, 8)), 'output_bias': jnp.zeros(8)}
    attention = layers.Attention(block.settings)
    _, weight_BHNQS = run(attention, {'params': own}, x_BLD, mask_BLL)
    assert_close(parts['attention_BHNQS'], weight_BHNQS, 1e-6)


def test_experts_all_alike_are_one_expert():
    many, params, x_BLD, mask_BLL, *_ = make_fame_block(5, num_experts=3)
    one, *_ = make_fame_block(5, num_experts=1)
    p = params['params']
    first = {name: p[name][:, :1] for name in ('query', 'query_bias')}
    alike = {name: jnp.repeat(first[name], 3, axis=1) for name in first}
    u_BLD, _ = run(many, {'params': p | alike}, x_BLD, mask_BLL)
    expected_BLD, _ = run(
        one, {'params': p | first | {'router': jnp.ones((2, 4, 1))}}, x_BLD, mask_BLL
    )
    assert_close(u_BLD, expected_BLD, 2e-6)


@pytest.mark.parametrize(
    'projection, options',
    [
        ('drop', {'positions': 'both', 'similarity': 'dot'}),
        ('keep', {'positions': 'relative', 'similarity': 'cosine'}),
    ],
)
def test_one_head_and_one_expert_is_sasrec(projection, options):
    """The feed-forward layers differ in width and activation; here both add their bias alone."""
    shared = {'num_blocks': 2, 'num_heads': 1, **options}
    sasrec, old = make_model('sasrec', **shared)
    module, new = make_model(
        'fame', num_experts=1, output_projection=projection, gate_scale='one', seed=1, **shared
    )
    attention = old['block_1']['attention']
    if projection == 'drop':
        attention |= {'output': jnp.eye(8)[None], 'output_bias': jnp.zeros(8)}
    else:
        new['facet_block'] |= {name: attention[name] for name in ('output', 'output_bias')}
    names = ['key', 'key_bias', 'value', 'value_bias']
    names += ['distance'] if 'distance' in attention else []
    new |= {name: old[name] for name in old if name != 'block_1'}
    new['facet_block'] |= {name: attention[name] for name in names}
    new['facet_block'] |= {name: attention[name][:, None] for name in ('query', 'query_bias')}
    new['facet_block'] |= {
        name: old['block_1'][name] for name in ('attention_norm', 'feed_forward_norm')
    }
    down = old['block_1']['feed_forward']['down']
    down['kernel'] = jnp.zeros_like(down['kernel'])
    new['facet_block'] |= {'down': jnp.zeros((1, 8, 8)), 'down_bias': down['bias'][None]}
    new['facet_block']['facet'] = jnp.eye(8)[None]
    fields = rows(5)
    expected_BLD, _ = encode(sasrec, old, *fields)
    query_BLD, parts = encode(module, new, *fields)
    assert (np.asarray(parts['facet_block']['gate_BLH']) == 1).all()
    assert_close(query_BLD, expected_BLD, 1e-6)


# Dependencies, packing, size.


def test_a_query_depends_on_its_own_prefix_alone():
    assert_depends_on_prefix_alone(*make_model('fame', positions='both', num_blocks=2))


@pytest.mark.parametrize('positions, blocks', [('relative', 2), ('start', 1)])
def test_packing_changes_neither_loss_nor_gradients(positions, blocks):
    module, params = make_model('fame', positions=positions, num_blocks=blocks)
    # A key's bias adds the same to all logits of a query.
    idle = {f'block_{n}/attention/key_bias' for n in range(blocks - 1)} | {'facet_block/key_bias'}
    assert_packing_changes_nothing(module, params, idle)


def test_the_last_column_alone():
    module, params = make_model('fame', positions='both', num_blocks=2)
    fields = rows(5)
    full_BLD, _ = encode(module, params, *fields)
    last_B1D, parts = encode(module, params, *fields, last=True)
    assert_close(last_B1D, full_BLD[:, -1:])
    assert parts['block_0']['attention_BHNQS'].shape == (4, 2, 1, 5, 5)
    assert parts['facet_block']['gate_BLH'].shape == (4, 1, 2)


def test_number_of_parameters():
    below = 13 * 8 + (8 + 8) + count_block()
    experts = 2 * 3 * (8 * 4 + 4)
    keys_and_values = 2 * (2 * (8 * 4 + 4))
    distance = 2 * 6
    router = 2 * (3 * 4) * 3
    attention_norm = 8 + 8
    feed_forward = (4 * 4 + 4) + (4 * 4 + 4)
    feed_forward_norm = 4 + 4
    gate = 8 * 2 + 2
    facets = 2 * 8 * 4
    total = below + experts + keys_and_values + distance + router + attention_norm
    total += feed_forward + feed_forward_norm + gate + facets
    options = [
        ({}, 0),
        ({'ffn_shared': False}, feed_forward),
        ({'output_projection': 'keep'}, 8 * 8 + 8),
        ({'attention_residual': 'none'}, -attention_norm),
        ({'attention_bias': False}, -3 * 8 - 2 * 3 * 4 - 2 * 8),
        ({'positions': 'start'}, 6 * 8 - 2 * distance),
    ]
    for option, more in options:
        assert count_parameters(make_model('fame', num_blocks=2, **option)[0]) == total + more


def count_block():
    """One block of the backbone, with its distance bias."""
    return 4 * (8 * 8 + 8) + 2 * (8 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 2 * 6


@pytest.mark.parametrize('scale, total', [('heads', 4), ('one', 1)])
def test_gates_sum_to_the_heads_or_to_one(scale, total):
    module, params = make_model('fame', num_heads=4, gate_scale=scale)
    _, parts = encode(module, params, *rows(2))
    assert_close(np.sum(parts['facet_block']['gate_BLH'], axis=-1), np.full((3, 2), total))
    assert_close(np.sum(parts['facet_block']['router_BLHN'], axis=-1), np.ones((3, 2, 4)))


@pytest.mark.parametrize('similarity', ['dot', 'cosine'])
def test_intermediates_add_up_to_the_query(similarity):
    module, params = make_model('fame', similarity=similarity, temperature=0.2)
    fields = rows(5)
    query_B1D, _ = encode(module, params, *fields, last=True)
    parts = encode(module, params, *fields, method='intermediates')
    query_BD = np.einsum('BH,BHD->BD', parts['gate_BH'], parts['head_BHD'])
    assert_close(query_BD, query_B1D[:, 0], 2e-5)
    assert_close(parts['positions_BLHN'][:, -1], parts['router_BHN'])
    real_BL = fields[2] == fields[2][:, -1:]
    attended_BHN = np.where(real_BL[:, None, None], parts['attention_BHNL'], 0).sum(axis=-1)
    ends_B = fields[2][:, -1] > 0
    assert_close(attended_BHN[ends_B], np.ones((ends_B.sum(), 2, 3)))


@pytest.mark.parametrize('options', [{}, {'future_targets': (1.0, 0.5), 'seen_weight': 3.0}])
def test_the_loss_of_heads_is_that_of_each_head_in_the_place_of_the_query(options):
    """The gate is replaced by one head at a time, whose query then is that head's own."""
    module, params = make_model('fame', num_heads=2, num_experts=2, temperature=0.5)
    plain = compile_objective(module, **options)
    total, weight, metrics = compile_objective(module.clone(head_loss=0.3), **options)(
        params, BATCH, new_key(0)
    )
    assert metrics.keys() == {'head_loss'}
    alone = []
    for head in range(2):
        block = dict(params['facet_block'])
        block['gate'] = jnp.zeros_like(block['gate'])
        # A gate of 2 for this head and of 0 for the other; the length of u does not matter.
        block['gate_bias'] = jnp.where(jnp.arange(2) == head, 100.0, 0.0)
        alone.append(plain({**params, 'facet_block': block}, BATCH, new_key(0))[0])
    assert_close(metrics['head_loss'], sum(alone) / 2 / weight)
    without, same, _ = plain(params, BATCH, new_key(0))
    assert_close(total, without + 0.3 * sum(alone) / 2)
    assert weight == same


def test_the_loss_of_the_only_head_is_the_loss_again():
    module, params = make_model('fame', num_heads=1, num_experts=2)
    (total, _), gradient = compile_gradient(module)(params, BATCH, new_key(0))
    (both, _), other = compile_gradient(module.clone(head_loss=0.3))(params, BATCH, new_key(0))
    assert_close(both, 1.3 * total)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(two, 1.3 * one, atol=1e-5 * max(1, np.abs(one).max()))


def test_the_loss_of_heads_is_for_the_next_item():
    with pytest.raises(ValueError, match=r'head_loss=0.3 is not for FAME over BERT4Rec'):
        make_model('fame_bert4rec', head_loss=0.3)[0].validate()
