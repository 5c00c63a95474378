"""FAME against explicit float64 loops of equations 7 to 17, and what it reduces to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers_test import (
    ROWS,
    affine_loop,
    assert_close,
    attend_loop,
    block_loop,
    float64,
    new_key,
    norm_loop,
    quick_jit,
    random_tree,
    relu_loop,
    rows,
    softmax_loop,
)
from sasrec_test import (
    ALONE,
    PACKED,
    assert_packing_changes_nothing,
    assert_reach_is_the_prefix,
    comparable_loop,
    count,
    encode,
    loss_and_gradient,
    make_batch,
    make_model,
)

from fame_jax.models import facet_block, fame, layers


def facet_loop(x_LD, segments_L, p, block):
    """u, and everything on the way to it, of one row."""
    num_heads, num_experts = block.num_heads, block.num_experts
    length, width = x_LD.shape
    head_width = width // num_heads
    u_LD = np.zeros((length, width))
    out = {
        'attention_HNQS': np.zeros((num_heads, num_experts, length, length)),
        'router_LHN': np.zeros((length, num_heads, num_experts)),
        'heads_LHK': np.zeros((length, num_heads, head_width)),
        'gate_LH': np.zeros((length, num_heads)),
    }
    for i in range(length):
        if not segments_L[i]:
            continue
        f_HK = []
        for h in range(num_heads):
            f_NK = []
            for n in range(num_experts):
                query_K = affine_loop(x_LD[i], p, 'query', (h, n))  # (12)
                out['attention_HNQS'][h, n, i], f_K = attend_loop(  # (13) to (15)
                    x_LD, segments_L, i, query_K, p, h, block.scale
                )
                f_NK.append(f_K)
            read = np.concatenate(f_NK) if block.routing == 'outputs' else x_LD[i]
            beta_N = softmax_loop(read @ p['router'][h])  # (16)
            active = sorted(range(num_experts), key=lambda n: (-beta_N[n], n))
            idle = active[block.active_experts or num_experts :]
            beta_N[idle] = 0
            beta_N = beta_N / sum(beta_N)
            out['router_LHN'][i, h] = beta_N
            if block.routing == 'inputs':
                out['attention_HNQS'][h, idle, i] = 0
            f_HK.append(sum(beta * f_K for beta, f_K in zip(beta_N, f_NK)))  # (17)
        f_D = np.concatenate(f_HK)
        if block.output_projection == 'keep':
            f_D = sum(f_HK[h] @ p['output'][h] for h in range(num_heads)) + p['output_bias']
        if block.attention_residual in ('slice', 'norm'):
            f_D = x_LD[i] + f_D
        if block.attention_residual == 'norm':
            f_D = norm_loop(f_D, p['attention_norm'])
        for h in range(num_heads):
            f_K, own = f_D[h * head_width : (h + 1) * head_width], 0 if block.ffn_shared else h
            inner_K = relu_loop(affine_loop(f_K, p, 'up', own))
            f_K = norm_loop(f_K + affine_loop(inner_K, p, 'down', own), p['feed_forward_norm'])
            out['heads_LHK'][i, h] = f_K  # (7)
        gate_H = softmax_loop(out['heads_LHK'][i].reshape(-1) @ p['gate'] + p['gate_bias'])  # (10)
        out['gate_LH'][i] = gate_H * (num_heads if block.gate_scale == 'heads' else 1)
        for h in range(num_heads):
            u_LD[i] += out['gate_LH'][i, h] * p['facet'][h] @ out['heads_LHK'][i, h]
    return u_LD, out


def make_block(length, seed=0, **options):
    """A facet block of width 8 with random parameters, and random inputs for ROWS."""
    default = {
        'num_heads': 2,
        'num_experts': 3,
        'routing': 'outputs',
        'active_experts': 0,
        'dropout': 0.0,
        'attention_dropout': -1.0,
        'attention': 'einsum',
        'remat': 'none',
        'max_distance': 3,
        'bias': True,
        'scale': 'head',
        'attention_residual': 'norm',
        'output_projection': 'drop',
        'facet_init': 'slices',
        'facet_learned': True,
        'gate_scale': 'heads',
        'ffn_shared': True,
        'dtype': jnp.float32,
    }
    block = facet_block.FacetBlock(**default | options)
    segments_BL = np.array(ROWS[length], np.int32)
    x_BLD = np.random.default_rng(seed).normal(size=(*segments_BL.shape, 8)).astype(np.float32)
    mask_BLL = layers.visible(segments_BL)
    shapes = jax.eval_shape(
        lambda: block.init(new_key(0), x_BLD, mask_BLL, train=False, last=False)
    )
    return block, random_tree(shapes, seed), x_BLD, mask_BLL, segments_BL


def run(block, params, x_BLD, mask_BLL, train=False, last=False, **options):
    f = partial(block.apply, train=train, last=last, **options)
    return quick_jit(f)(params, x_BLD, mask_BLL)


OPTIONS = [
    {},
    {'attention_residual': 'slice'},
    {'attention_residual': 'none'},
    {'attention_residual': 'norm', 'output_projection': 'keep', 'gate_scale': 'one'},
    {'attention_residual': 'slice', 'output_projection': 'keep', 'ffn_shared': False},
    {'attention_residual': 'none', 'output_projection': 'keep', 'max_distance': 0},
    {'ffn_shared': False, 'gate_scale': 'one', 'bias': False, 'scale': 'model'},
    {'active_experts': 2, 'attention': 'fused'},
    {'routing': 'inputs'},
    {'routing': 'inputs', 'active_experts': 2},
    {'routing': 'inputs', 'active_experts': 1, 'max_distance': 0, 'attention': 'fused'},
]
CASES = [
    *((5, {'num_heads': 2, 'num_experts': 3, **options}) for options in OPTIONS),
    (1, {'num_heads': 1, 'num_experts': 1}),
    (5, {'num_heads': 1, 'num_experts': 1, 'attention_residual': 'none'}),
    (2, {'num_heads': 2, 'num_experts': 1, 'gate_scale': 'one'}),
    (2, {'num_heads': 4, 'num_experts': 2, 'ffn_shared': False}),
    (5, {'num_heads': 4, 'num_experts': 2, 'max_distance': 9, 'output_projection': 'keep'}),
]


@pytest.mark.parametrize('length, options', CASES)
def test_facet_block_matches_the_loop(length, options):
    block, params, x_BLD, mask_BLL, segments_BL = make_block(length, **options)
    u_BLD, parts = run(block, params, x_BLD, mask_BLL)
    p = float64(params['params'])
    for b, segments_L in enumerate(segments_BL):
        real = segments_L > 0
        u_LD, expected = facet_loop(float64(x_BLD[b]), segments_L, p, block)
        assert_close(
            parts['attention_BHNQS'][b][:, :, real], expected['attention_HNQS'][:, :, real]
        )
        assert_close(parts['router_BLHN'][b][real], expected['router_LHN'][real])
        assert_close(parts['heads_BLHK'][b][real], expected['heads_LHK'][real])
        assert_close(parts['gate_BLH'][b][real], expected['gate_LH'][real])
        assert_close(u_BLD[b][real], u_LD[real])


@pytest.mark.parametrize('offset', [0.0, 10.0])
def test_a_narrow_head_keeps_its_digits(offset):
    """Two numbers close to each other, far from zero: LayerNorm has only their difference."""
    block, params, x_BLD, mask_BLL, _ = make_block(1, num_heads=4, attention_residual='slice')
    x_BLD = x_BLD + np.float32(offset)
    p = params['params']
    p |= {name: 0 * p[name] for name in ('value', 'value_bias', 'down', 'down_bias')}
    _, parts = run(block, {'params': p}, x_BLD, mask_BLL)
    for x_K, actual_K in zip(x_BLD.reshape(-1, 2), parts['heads_BLHK'].reshape(-1, 2)):
        assert_close(actual_K, norm_loop(float64(x_K), p['feed_forward_norm']))


def test_facet_block_asked_for_the_last_column():
    block, params, x_BLD, mask_BLL, _ = make_block(5, output_projection='keep')
    full_BLD, full = run(block, params, x_BLD, mask_BLL)
    last_B1D, last = run(block, params, x_BLD, mask_BLL, last=True)
    assert_close(last_B1D, full_BLD[:, -1:])
    assert last['attention_BHNQS'].shape == (4, 2, 3, 1, 5)
    for name in ('router_BLHN', 'heads_BLHK', 'gate_BLH'):
        assert_close(last[name], full[name][:, -1:])


@pytest.mark.parametrize('residual', ['norm', 'none'])
def test_dropping_everything_leaves_what_no_dropout_is_over(residual):
    block, params, x_BLD, mask_BLL, segments_BL = make_block(
        2, dropout=1.0, attention_residual=residual
    )
    u_BLD, _ = run(block, params, x_BLD, mask_BLL, train=True, rngs={'dropout': new_key(0)})
    p = float64(params['params'])
    for name in ('value', 'value_bias', 'down', 'down_bias'):
        p[name] = 0 * p[name]
    u_LD, _ = facet_loop(float64(x_BLD[1]), segments_BL[1], p, block)
    assert_close(u_BLD[1], u_LD)


def test_slices_hand_head_h_slice_h_of_the_item():
    w_HDK = facet_block.slice_selectors(None, (3, 6, 2))
    item_D = np.array([1.0, 2, 3, 4, 5, 6])
    assert [(item_D @ w_DK).tolist() for w_DK in w_HDK] == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize('facet_init, same', [('slices', True), ('random', False)])
def test_facets_start_as_configured(facet_init, same):
    block, _, x_BLD, mask_BLL, _ = make_block(1, facet_init=facet_init)
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
    options = ('num_heads', 'num_experts', 'ffn_shared', 'attention_residual', 'output_projection')
    options += ('routing', 'active_experts', 'gate_scale')
    unread = ('dropout', 'attention_dropout', 'attention', 'remat', 'max_distance', 'bias')
    block = facet_block.FacetBlock(
        **{name: getattr(module, name) for name in options},
        **dict.fromkeys((*unread, 'facet_init', 'facet_learned')),
        scale=module.attention_scale,
        dtype=None,
    )
    u_LD, parts = facet_loop(x_LD, segments_L, facet, block)
    table_VD = p['item_table' if module.tied_items else 'output_table']
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
    (5, {'num_heads': 4, 'num_experts': 2, 'attention_scale': 'model', 'tied_items': False}),
    (5, {'routing': 'inputs', 'active_experts': 2, 'num_blocks': 2}),
]


@pytest.mark.parametrize('length, options', MODELS)
def test_scores_match_the_loop(length, options):
    module, params = make_model('fame', **options)
    fields = rows(length)
    query_BLD, item_VD = encode(module, params, *fields, method='query_and_items')
    score_BLV = np.einsum('BLD,VD->BLV', query_BLD, item_VD)
    p = float64(params)
    for score_LV, tokens_L, positions_L, segments_L in zip(score_BLV, *fields, strict=True):
        expected_LV = fame_loop(p, tokens_L, positions_L, segments_L, module)
        assert_close(score_LV[segments_L > 0], expected_LV[segments_L > 0], 2e-5)


@pytest.mark.parametrize('similarity', ['dot', 'cosine'])
def test_the_heads_scores_sum_to_the_collapsed_score(similarity):
    module, params = make_model('fame', similarity=similarity, temperature=0.2)
    fields = rows(2)
    query_BLD, parts = encode(module, params, *fields)
    parts = parts['facet_block']
    table_VD = np.array([comparable_loop(x_D, similarity) for x_D in params['item_table']])
    head_BLHV, score_BLV = fame.head_scores(
        parts['gate_BLH'], parts['heads_BLHK'], params['facet_block']['facet'], table_VD
    )
    own_K = table_VD[3] @ params['facet_block']['facet'][1]
    assert_close(head_BLHV[1, 0, 1, 3], own_K @ parts['heads_BLHK'][1, 0, 1])
    if similarity == 'cosine':
        u_BLD = np.einsum(
            'BLH,BLHK,HDK->BLD',
            parts['gate_BLH'],
            parts['heads_BLHK'],
            params['facet_block']['facet'],
        )
        score_BLV = score_BLV / (np.linalg.norm(u_BLD, axis=-1, keepdims=True) * 0.2)
    item_VD = encode(module, params, method='item_vectors')
    assert_close(np.einsum('BLD,VD->BLV', query_BLD, item_VD), score_BLV)


# What it reduces to.


def test_one_expert_is_plain_attention():
    block, params, x_BLD, mask_BLL, _ = make_block(5, num_experts=1)
    _, parts = run(block, params, x_BLD, mask_BLL)
    assert (np.asarray(parts['router_BLHN']) == 1).all()
    own = {name: params['params'][name] for name in ('key', 'key_bias', 'distance')}
    own |= {name: params['params'][name] for name in ('value', 'value_bias')}
    own |= {name: params['params'][name][:, 0] for name in ('query', 'query_bias')}
    own |= {'output': jnp.zeros((2, 4, 8)), 'output_bias': jnp.zeros(8)}
    attention = layers.Attention(2, 0.0, 3, True, 'head', jnp.float32)
    _, weight_BHNQS = run(attention, {'params': own}, x_BLD, mask_BLL)
    assert_close(parts['attention_BHNQS'], weight_BHNQS, 1e-6)


def test_experts_all_alike_are_one_expert():
    many, params, x_BLD, mask_BLL, _ = make_block(5, num_experts=3)
    one, _, _, _, _ = make_block(5, num_experts=1)
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
    shared = {'num_blocks': 2, 'num_heads': 1, 'inner_multiple': 1, 'activation': 'relu', **options}
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
    for name in ('up', 'down'):
        dense = old['block_1']['feed_forward'][name]
        new['facet_block'] |= {name: dense['kernel'][None], f'{name}_bias': dense['bias'][None]}
    new['facet_block']['facet'] = jnp.eye(8)[None]
    fields = rows(5)
    expected_BLD, _ = encode(sasrec, old, *fields)
    query_BLD, parts = encode(module, new, *fields)
    assert (np.asarray(parts['facet_block']['gate_BLH']) == 1).all()
    assert_close(query_BLD, expected_BLD, 1e-6)


# Reach, packing, size, gradients.


@pytest.mark.parametrize('positions, blocks', [('relative', 2), ('both', 1)])
def test_a_query_depends_on_its_own_prefix_alone(positions, blocks):
    assert_reach_is_the_prefix(*make_model('fame', positions=positions, num_blocks=blocks))


@pytest.mark.parametrize('positions, blocks', [('relative', 2), ('start', 1)])
def test_packing_changes_neither_loss_nor_gradients(positions, blocks):
    module, params = make_model('fame', positions=positions, num_blocks=blocks)
    # A key's bias adds the same to all logits of a query.
    idle = {f'block_{n}/attention/key_bias' for n in range(blocks - 1)} | {'facet_block/key_bias'}
    assert_packing_changes_nothing(module, params, idle)


def test_a_history_means_the_same_in_a_row_of_any_length():
    module, params = make_model('fame', positions='both')
    batch = make_batch(ALONE)
    query_BLD, _ = encode(module, params, *batch[:3])
    short_BLD, _ = encode(module, params, *(field[:1, :4] for field in batch[:3]))
    assert_close(short_BLD, query_BLD[:1, :4])


def test_asked_for_the_last_column():
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
        ({'tied_items': False}, 13 * 8),
        ({'attention_bias': False}, -3 * 8 - 2 * 3 * 4 - 2 * 8),
        ({'positions': 'start'}, 6 * 8 - 2 * distance),
    ]
    for option, more in options:
        assert count(make_model('fame', num_blocks=2, **option)[0]) == total + more


def count_block():
    """One block of the backbone, with its distance bias."""
    return 4 * (8 * 8 + 8) + 2 * (8 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 2 * 6


@pytest.mark.parametrize('learned', [True, False])
def test_facets_have_a_gradient_only_when_learned(learned):
    module, params = make_model('fame', facet_learned=learned)
    _, gradient = loss_and_gradient(module)(params, make_batch(PACKED))
    assert bool(np.any(gradient['facet_block']['facet'])) == learned
    assert np.any(gradient['facet_block']['gate'])


@pytest.mark.parametrize('scale, total', [('heads', 4), ('one', 1)])
def test_gates_sum_to_the_heads_or_to_one(scale, total):
    module, params = make_model('fame', num_heads=4, gate_scale=scale)
    _, parts = encode(module, params, *rows(2))
    assert_close(np.sum(parts['facet_block']['gate_BLH'], axis=-1), np.full((3, 2), total))
    assert_close(np.sum(parts['facet_block']['router_BLHN'], axis=-1), np.ones((3, 2, 4)))
