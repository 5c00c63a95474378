"""Recommendations from a catalogue that devices share are those of one device."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_fixtures import MESHES, collectives, on_eight
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fame_jax import stages
from fame_jax.config import flags
from fame_jax.main import main
from fame_jax.models import registry
from fame_jax.parallel import mesh as mesh_lib
from fame_jax.serving import export, rows, topk
from fame_jax.serving.recommender import Recommender, ServedModel
from fame_jax.stages.open_recommender import open_recommender, serving_model

WIDTH = 3
EXAMPLES = 3  # each is compiled; the same ones in every session, for the cache


def put_items(item_VD, mesh):
    """Item vectors split over `model`; padding rows past V, here NaN, must have no effect."""
    count = mesh_lib.table_rows(len(item_VD) - 1, mesh)
    filled = np.full((count, item_VD.shape[1]), np.nan, np.float32)
    filled[: len(item_VD)] = item_VD
    return jax.device_put(filled, mesh_lib.item_sharding(mesh))


def highest(score_BQV):
    return score_BQV.max(axis=1)


def query_of_row(params, tokens_BL, positions_BL, segments_BL):
    """Two queries of a history: the parameters' rows of its first and its last token."""
    return params[tokens_BL[:, jnp.array([0, -1])]]


def make_histories(draw, num_items, count, length=4):
    """Tokens, positions and segments of random histories, and the items they have seen."""
    tokens_BL = draw.integers(1, num_items + 1, (count, length)).astype(np.int32)
    seen_BS = np.where(draw.random(tokens_BL.shape) < 0.7, tokens_BL, 0)
    return (tokens_BL, tokens_BL * 0, tokens_BL * 0 + 1), seen_BS


def in_order(score_V, allowed, top_k):
    """By a sort: the allowed items of highest score, of equal ones the first; -inf fills up."""
    order = sorted((v for v in allowed), key=lambda v: (-score_V[v], v))[:top_k]
    return order, [*score_V[order], *[-np.inf] * (top_k - len(order))]


@on_eight
@given(
    mesh=st.sampled_from(MESHES),
    num_items=st.integers(1, 30),
    top_k=st.integers(1, 31),
    histories=st.sampled_from([1, 3, 8]),
    allowed=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@example(mesh=(1, 8), num_items=3, top_k=4, histories=1, allowed=1.0, seed=0)  # more devices
@example(mesh=(2, 4), num_items=30, top_k=31, histories=3, allowed=0.3, seed=1)  # all items
@example(mesh=(4, 2), num_items=29, top_k=5, histories=8, allowed=1.0, seed=2)
@example(mesh=(8, 1), num_items=9, top_k=9, histories=8, allowed=1.0, seed=3)
def test_the_top_items_are_those_of_one_device(mesh, num_items, top_k, histories, allowed, seed):
    """Small whole numbers make exact and often equal scores; k may be V + 1."""
    mesh, top_k = mesh_lib.make_mesh(*mesh), min(top_k, num_items + 1)
    draw = np.random.default_rng(seed)
    params, item_VD = draw.integers(-1, 2, (2, num_items + 1, WIDTH)).astype(np.float32)
    inputs, seen_BS = make_histories(draw, num_items, histories)
    allowed_V = draw.random(num_items + 1) <= allowed
    allowed_V[0] = False
    allowed_BX = rows.candidate_bits(allowed_V, [*seen_BS])

    def top_k_items(item_VD, mesh):
        query_BQD = topk.encode_rows(query_of_row, params, inputs, mesh=mesh)
        return topk.top_k_items(highest, top_k, query_BQD, item_VD, allowed_BX, mesh=mesh)

    item_BK, score_BK = map(np.asarray, top_k_items(item_VD, None))
    sharded = top_k_items(put_items(item_VD, mesh), mesh)
    np.testing.assert_array_equal(sharded[0], item_BK)
    np.testing.assert_array_equal(sharded[1], score_BK)
    for b, (tokens_L, seen_S) in enumerate(zip(inputs[0], seen_BS)):
        score_V = (params[tokens_L[[0, -1]]] @ item_VD.T).max(axis=0)
        items, scores = in_order(score_V, set(np.flatnonzero(allowed_V)) - set(seen_S), top_k)
        assert item_BK[b, : len(items)].tolist() == items
        np.testing.assert_array_equal(score_BK[b], scores)


@on_eight
def test_a_nan_on_any_device_is_an_error():
    mesh = mesh_lib.make_mesh(2, 4)
    item_VD = np.ones((30, WIDTH), np.float32)
    item_VD[20] = np.nan
    model = ServedModel(query_of_row, highest, jnp.asarray(item_VD[:9]), None, 4, mesh=mesh)
    ids = ['', *map(str, range(1, 30))]
    for broken, is_error in ((20, True), (0, False)):
        table_VD = np.ones_like(item_VD)
        table_VD[broken] = np.nan
        shared = model._replace(item_VD=put_items(table_VD, mesh))
        recommender = Recommender(shared, ids, np.ones(30))
        if is_error:
            with pytest.raises(FloatingPointError, match='NaN'):
                recommender.recommend(['3'])
        else:
            assert recommender.recommend(['3'], 4).items == ['1', '2', '4', '5']


@on_eight
def test_similar_items_and_queries_are_those_of_one_device():
    mesh, draw = mesh_lib.make_mesh(2, 4), np.random.default_rng(0)
    item_VD = draw.normal(size=(31, WIDTH)).astype(np.float32)
    one = ServedModel(query_of_row, highest, jnp.asarray(item_VD), jnp.asarray(item_VD), 4)
    facet_HDK = jnp.asarray(draw.normal(size=(2, WIDTH, 3)), jnp.float32)
    one = one._replace(facet_HDK=facet_HDK)
    shared = one._replace(item_VD=put_items(item_VD, mesh), mesh=mesh)
    ids = ['', *map(str, range(1, 31))]
    one, shared = (Recommender(model, ids, np.ones(31)) for model in (one, shared))
    assert shared.similar_items('30', 29).items == one.similar_items('30', 29).items
    assert shared.similar_items('30', 29, 2).items == one.similar_items('30', 29, 2).items
    np.testing.assert_array_equal(shared.query(['3', '30']), one.query(['3', '30']))


def compile_top_k(encode, combine, params, mesh, num_items, histories, width, top_k=7):
    """The two programs of serving on a mesh, for rows of length 8."""
    shape = mesh_lib.table_rows(num_items, mesh), width
    item_VD = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=mesh_lib.item_sharding(mesh))
    row_BL = jax.ShapeDtypeStruct((histories, 8), jnp.int32)
    allowed_BX = jax.ShapeDtypeStruct((histories, num_items // 8 + 1), jnp.uint8)
    encoded = topk.encoder(encode, mesh).lower(params, (row_BL,) * 3)
    (query,) = jax.tree.leaves(encoded.out_info)
    compiled = encoded.compile()
    (sharding,) = jax.tree.leaves(compiled.output_shardings)
    query_BQD = jax.ShapeDtypeStruct(query.shape, query.dtype, sharding=sharding)
    arguments = query_BQD, item_VD, allowed_BX
    best = topk.top_k_items.lower(combine, top_k, *arguments, mesh=mesh)
    return compiled, best.compile()


@on_eight
@pytest.mark.parametrize('histories', [1, 8])
@pytest.mark.parametrize('data, model', [(2, 4), (1, 8)])
def test_devices_send_only_their_top_items(data, model, histories):
    """Of 20,001 items each device sends k items and scores for each history."""
    mesh = mesh_lib.make_mesh(data, model)
    params = jax.ShapeDtypeStruct((9, WIDTH), jnp.float32)
    compiled = compile_top_k(query_of_row, highest, params, mesh, 20_000, histories, WIDTH)
    sent = [each for program in compiled for each in collectives(program)]
    here = histories if histories % data else histories // data
    assert {kind for kind, _ in sent} == {'all-gather'} and len(sent) <= 2
    assert max(size for _, size in sent) == 7 * model * here


@on_eight
@pytest.mark.parametrize(
    'name, histories',
    [('sasrec', 1), *(pytest.param('fame', n, marks=pytest.mark.slow) for n in (1, 8))],
)
def test_a_model_sends_the_rows_of_its_histories_and_no_table(name, histories):
    mesh = mesh_lib.make_mesh(2, 4)
    options = {'width': 8, 'num_blocks': 1, 'max_length': 8}
    options |= {'num_experts': 2} if name == 'fame' else {}
    module = registry.make(name, options, num_items=20_000, mesh=mesh)
    init = mesh_lib.init_sharded(functools.partial(registry.init_params, module), mesh)
    model = serving_model(module, init(jax.random.key(0)), 8)
    shapes = {shard.data.shape for shard in model.item_VD.addressable_shards}
    assert shapes == {(mesh_lib.table_rows(20_000, mesh) // 4, 8)}
    compiled = compile_top_k(model.encode, model.combine, model.params, mesh, 20_000, histories, 8)
    sent = [each for program in compiled for each in collectives(program)]
    here = histories if histories % 2 else histories // 2
    assert len(sent) <= 3
    assert max(size for _, size in sent) == here * 8 * 8


FLAGS = [
    *('--synthetic=users=70,items=45', '--k_core=0', '--width=8'),
    *('--pretrain_epochs=1', '--finetune_epochs=1', '--max_length=12'),
    *('--rows_per_step=8', '--row_length=16', '--progress=none'),
]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(model) -> its run on one device, with recommendations for all users."""

    @functools.cache
    def train(model):
        folder = tmp_path_factory.mktemp(model)
        trained = 'pretrain,finetune' if model == 'fame' else 'pretrain'
        options = ['--num_experts=2'] if model == 'fame' else []
        use(folder, f'prepare,{trained},recommend', *FLAGS, *options, f'--model={model}')
        return folder

    return train


def use(folder, stages, *flags):
    assert main([f'--workdir={folder}', f'--stages={stages}', '--progress=none', *flags]) == 0


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@on_eight
@pytest.mark.parametrize(
    'model, mesh',
    [
        ('sasrec', (1, 4)),
        ('sasrec', (4, 2)),
        *(pytest.param('fame', mesh, marks=pytest.mark.slow) for mesh in MESHES),
        pytest.param('atten_mixer', (2, 4), marks=pytest.mark.slow),  # has several queries
        pytest.param('bert4rec', (8, 1), marks=pytest.mark.slow),  # has a bias for each item
    ],
)
def test_the_stage_recommends_the_same_items_on_a_mesh(model, mesh, trained, tmp_path):
    folder, path = trained(model), tmp_path / 'out.jsonl'
    flags = [f'--data_parallel={mesh[0]}', f'--model_parallel={mesh[1]}']
    use(folder, 'recommend', *flags, f'--out={path}')
    for one, many in zip(lines(folder / 'recommendations.jsonl'), lines(path), strict=True):
        np.testing.assert_allclose(many.pop('scores'), one.pop('scores'), rtol=1e-4, atol=1e-5)
        assert one == many


@on_eight
def test_item_vectors_are_split_only_on_a_mesh(trained):
    argv = [f'--workdir={trained("sasrec")}', '--stages=recommend', '--progress=none']
    shared = stages.open_run(flags.parse([*argv, '--model_parallel=4']))
    for mesh, count in ((shared.mesh, 48 // 4), (None, 46)):
        model = open_recommender(shared, mesh).model
        assert model.mesh is mesh
        for array_VD in (model.item_VD, model.params['item_table']):
            assert {shard.data.shape for shard in array_VD.addressable_shards} == {(count, 8)}


@pytest.mark.slow
@on_eight
def test_other_stages_give_the_same_on_a_mesh(trained, tmp_path):
    """Evaluation is on the mesh; export and explain use one device."""
    folder, outputs = trained('fame'), []
    for i, more in enumerate([[], ['--model_parallel=4', '--data_parallel=2']]):
        use(folder, 'evaluate,explain,export', *more, '--top_k=3', f'--out={tmp_path}/{i}')
        results = folder / 'results.json'
        outputs.append({'results': json.loads(results.read_text())['results']})
        results.unlink()
        outputs[i]['explanation'] = json.loads((tmp_path / f'{i}/explanation.json').read_text())
        outputs[i]['export'] = export.load(tmp_path / f'{i}/export').recommend(['item-1'], 3)
    assert outputs[0] == outputs[1]
