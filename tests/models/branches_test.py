"""Models with branches: the mean of separate models, each trained as if it were alone."""

import jax
import numpy as np
import pytest
from fixtures import BATCH, assert_close, compile_gradient, encode, make_model, quick_jit, rows

from fame_jax.losses import LossOptions
from fame_jax.models import branches, registry, surgery

R = 2
SOFT = {'future_targets': (1.0, 0.5), 'seen_weight': 3.0}
BRANCHED = [name for name, cls in registry.MODELS.items() if issubclass(cls, branches.Branches)]


def make(name, **options):
    """A small model of R branches of width 8."""
    return make_model(name, **{'width': 8 * R, 'branches': R} | options)


def branch_params(params, r):
    """Branch r's parameters, as those of a model of its own."""
    tree = jax.tree.map(lambda leaf: leaf[r], params['branches'])
    return tree | {'item_table': params['item_table'][:, 8 * r : 8 * r + 8]}


@pytest.mark.parametrize('name', BRANCHED)
@pytest.mark.parametrize('similarity', ['cosine', 'dot'])
def test_a_score_is_the_mean_of_the_branches_scores(name, similarity):
    module, params = make(name, similarity=similarity)
    fields = rows(5)
    query_BLD, _ = encode(module, params, *fields)
    item_VD = module.apply({'params': params}, method='item_vectors')
    branch = module.branch_module()
    assert branch.width == 8 and type(branch) is type(module).branch
    expected_BLV = np.zeros((*query_BLD.shape[:2], 13))
    for r in range(R):
        alone = branch_params(params, r)
        query_BLK, _ = encode(branch, alone, *fields)
        item_VK = branch.apply({'params': alone}, method='item_vectors')
        expected_BLV += np.einsum('BLK,VK->BLV', query_BLK, item_VK) / R
    assert_close(np.einsum('BLD,VD->BLV', query_BLD, item_VD), expected_BLV)


@pytest.mark.parametrize('name', BRANCHED)
def test_options_are_those_of_a_branch(name):
    cls = registry.MODELS[name]
    more = {'width': 192, 'branches': 3}
    assert registry.options(cls) == registry.options(cls.branch) | more
    assert (cls.losses, cls.recipe, cls.row_layout, cls.shardable_items) == (
        *(cls.branch.losses, cls.branch.recipe, cls.branch.row_layout),
        cls.branch.shardable_items,
    )


def test_vectors_keep_unit_length():
    module, params = make('branched_sasrec', temperature=0.5)
    query_BLD, _ = encode(module, params, *rows(5))
    item_VD = module.apply({'params': params}, method='item_vectors')
    assert_close(np.linalg.norm(query_BLD, axis=-1), np.full(query_BLD.shape[:2], 2.0))
    assert_close(np.linalg.norm(item_VD, axis=-1), np.ones(13))


@pytest.mark.parametrize('name', BRANCHED)
def test_each_branch_is_trained_as_if_it_were_alone(name):
    more = {'head_loss': 0.3} if name == 'branched_fame' else {}
    module, params = make(name, dropout=0.25, **more)
    key = jax.random.key(3)
    (total, weight), gradient = compile_gradient(module, **SOFT)(params, BATCH, key)
    branch = module.branch_module()
    of_branch, totals = compile_gradient(branch, **SOFT), []
    for r, branch_key in enumerate(jax.random.split(key, R)):
        alone = branch_params(params, r)
        (of_r, weight_r), gradient_r = of_branch(alone, BATCH, branch_key)
        totals.append(of_r)
        assert weight_r == weight
        jax.tree.map(lambda g, e: assert_close(g, e / R), branch_params(gradient, r), gradient_r)
    assert_close(total, np.mean(totals))
    assert totals[0] != totals[1]


def test_metrics_of_the_objective_are_means_over_branches():
    module, params = make('branched_fame', head_loss=0.3)
    loss, key = LossOptions(), jax.random.key(0)
    metrics = quick_jit(lambda p: module.objective(p, BATCH, key, loss)[2])(params)
    branch = module.branch_module()
    each = [
        branch.objective(branch_params(params, r), BATCH, k, loss)[2]['head_loss']
        for r, k in enumerate(jax.random.split(key, R))
    ]
    assert_close(metrics['head_loss'], np.mean(each))


def test_one_branch_is_the_model_itself():
    module, params = make_model('branched_sasrec', branches=1)
    plain = module.branch_module()
    own = jax.tree.map(lambda leaf: leaf[0], params['branches'])
    own |= {'item_table': params['item_table']}
    fields = rows(5)
    assert_close(encode(module, params, *fields)[0], encode(plain, own, *fields)[0])


def test_branches_start_apart():
    module, _ = make('branched_sasrec')
    params = registry.init_params(module, jax.random.key(0))
    first, second = (branch_params(params, r) for r in range(R))
    drawn = [path for path, leaf in _leaves(first) if leaf.std() > 0]
    assert {'item_table', 'block_0/attention/query'} <= set(drawn)
    for (path, a), (_, b) in zip(_leaves(first), _leaves(second)):
        assert (a != b).any() == (path in drawn)


def _leaves(tree):
    found = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return [(jax.tree_util.keystr(p, simple=True, separator='/'), leaf) for p, leaf in found]


def test_surgery_is_that_of_each_branch():
    module, fresh = make('branched_fame', expert_noise=0.1)
    backbone, old = make('branched_sasrec', seed=1)
    assert module.backbone_module() == backbone
    new = surgery.transplant(old, fresh, module.surgery_plan(jax.random.key(0)))
    noise = []
    for r in range(R):
        before, after = branch_params(old, r), branch_params(new, r)
        assert_close(after['item_table'], before['item_table'])
        attention, block = before['block_0']['attention'], after['facet_block']
        assert_close(block['key'], attention['key'])
        assert_close(block['up'], branch_params(fresh, r)['facet_block']['up'])
        noise.append(block['query'] - attention['query'][:, None])
    assert 0.05 < np.std(noise[0]) < 0.2
    assert np.abs(noise[0] - noise[1]).max() > 0.05  # experts of two branches are not the same


def test_facets_are_the_heads_of_all_branches():
    module, params = make('branched_fame')
    tokens = np.array([[3, 5, 2, 7]], np.int32)
    fields = tokens, np.arange(4, dtype=np.int32)[None], np.ones_like(tokens)
    parts = encode(module, params, *fields, method='intermediates')
    query_B1D = encode(module, params, *fields, last=True)[0]
    heads = R * module.num_heads
    assert parts['gate_BH'].shape == (1, heads)
    assert parts['router_BHN'].shape == (1, heads, module.num_experts)
    assert parts['attention_BHNL'].shape == (1, heads, module.num_experts, 4)
    assert parts['positions_BLHN'].shape == (1, 4, heads, module.num_experts)
    u_BD = np.einsum('BH,BHD->BD', parts['gate_BH'], parts['head_BHD'])
    assert_close(u_BD, query_B1D[:, 0], 2e-5)
    facet_HDK = module.facet_projections(params)
    assert facet_HDK.shape == (heads, 16, 4)
    for r in range(R):
        alone = branch_params(params, r)
        for h in range(2):
            place = r * 2 + h
            inside = slice(8 * r, 8 * r + 8)
            assert_close(facet_HDK[place, inside], alone['facet_block']['facet'][h])
            assert not np.delete(facet_HDK[place], np.r_[inside], axis=0).any()
            outside = np.delete(parts['head_BHD'][0, place], np.r_[inside])
            assert not outside.any() and parts['head_BHD'][0, place].any()


def test_a_view_of_a_branch_is_its_part_of_an_item_vector():
    module, params = make('branched_sasrec')
    facet_RDK = module.facet_projections(params)
    x_VD = module.apply({'params': params}, method='item_vectors')
    view_RVK = np.einsum('VD,RDK->RVK', x_VD, facet_RDK)
    assert_close(view_RVK, np.split(x_VD, R, axis=1))


@pytest.mark.parametrize(
    'options, message',
    [
        ({'width': 64}, 'width=64 does not divide into branches=3'),
        ({'width': 12, 'num_heads': 6}, 'width=4 does not divide.*each of branches=3'),
    ],
)
def test_wrong_sizes_are_refused(options, message):
    with pytest.raises(registry.UserError, match=message):
        registry.make('branched_sasrec', options)


@pytest.mark.parametrize(
    'name, obstacles',
    [
        ('miasrec', 'several queries for a history, item vectors that depend'),
        ('iclrec', 'frozen parameters, work before each epoch'),
    ],
)
def test_models_that_cannot_have_branches_are_refused(name, obstacles):
    kind = registry.MODELS[name]
    cls = type('Branched', (branches.Branches, kind), {'branch': kind, '__annotations__': {}})
    with pytest.raises(ValueError, match=obstacles):
        cls(width=16, branches=2).validate()


@pytest.mark.parametrize(
    'bases', [(registry.MODELS['sasrec'], branches.Branches), (branches.Branches,)]
)
def test_bases_in_an_order_that_would_ignore_the_branches_are_refused(bases):
    body = {'branch': registry.MODELS['sasrec'], '__annotations__': {}}
    with pytest.raises(TypeError, match='inherit from Branches and after it from its branch'):
        type('Wrong', bases, body)
