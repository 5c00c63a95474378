"""A catalogue that devices share is judged and recommended from as on one device.

As in `sharding_test`, the first test runs the others in a process with eight devices.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from sharding_test import EIGHT, MESHES, collectives, on_eight, run_on_eight

from fame_jax import config as config_lib
from fame_jax import evaluate, run, serve, serving, sharding
from fame_jax.main import main
from fame_jax.models.build import build, initial

WIDTH = 3
EXAMPLES = 3  # beside those that are named; each is compiled


@pytest.mark.skipif(EIGHT, reason='runs the others')
@pytest.mark.parametrize('marked', ['not slow', pytest.param('slow', marks=pytest.mark.slow)])
def test_on_run_on_eight(marked):
    run_on_eight(__file__, marked)


def rows_of(item_VD, mesh, beyond=np.nan):
    """Item vectors as a mesh has them; what is written in the rows past V must not be heard."""
    count = sharding.table_rows(len(item_VD) - 1, mesh)
    filled = np.full((count, item_VD.shape[1]), beyond, np.float32)
    filled[: len(item_VD)] = item_VD
    return jax.device_put(filled, NamedSharding(mesh, PartitionSpec(sharding.MODEL)))


def highest(score_BQV):
    return score_BQV.max(axis=1)


def query_of_row(params, tokens_BL, positions_BL, segments_BL):
    """Queries that are rows of the parameters, two of a history: its first and last token's."""
    return params[tokens_BL[:, jnp.array([0, -1])]]


def some_histories(draw, num_items, count, length=4):
    """Rows with 0 at places, as queries, and what they have seen."""
    tokens_BL = draw.integers(1, num_items + 1, (count, length)).astype(np.int32)
    seen_BS = np.where(draw.random(tokens_BL.shape) < 0.7, tokens_BL, 0)
    return (tokens_BL, tokens_BL * 0, tokens_BL * 0 + 1), seen_BS


def in_order(score_V, allowed, top_k):
    """By hand: the allowed items of highest score, of equal ones the first; -inf fills up."""
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
@settings(max_examples=EXAMPLES, deadline=None)
@example(mesh=(1, 8), num_items=3, top_k=4, histories=1, allowed=1.0, seed=0)  # more devices
@example(mesh=(2, 4), num_items=30, top_k=31, histories=3, allowed=0.3, seed=1)  # all items
@example(mesh=(4, 2), num_items=29, top_k=5, histories=8, allowed=1.0, seed=2)
@example(mesh=(8, 1), num_items=9, top_k=9, histories=8, allowed=1.0, seed=3)
def test_the_best_are_those_of_one_device(mesh, num_items, top_k, histories, allowed, seed):
    """Of small whole numbers, whose scores are exact and often alike; k may be V + 1."""
    mesh, top_k = sharding.make_mesh(*mesh), min(top_k, num_items + 1)
    draw = np.random.default_rng(seed)
    params, item_VD = draw.integers(-1, 2, (2, num_items + 1, WIDTH)).astype(np.float32)
    rows, seen_BS = some_histories(draw, num_items, histories)
    allowed_V = draw.random(num_items + 1) <= allowed
    allowed_V[0] = False
    asked = rows, seen_BS, allowed_V
    best = functools.partial(serve.best, query_of_row, highest, top_k, params)
    item_BK, score_BK = map(np.asarray, best(item_VD, *asked))
    found = best(rows_of(item_VD, mesh), *asked, mesh=mesh)
    np.testing.assert_array_equal(found[0], item_BK)
    np.testing.assert_array_equal(found[1], score_BK)
    for b, (tokens_L, seen_S) in enumerate(zip(rows[0], seen_BS)):
        score_V = (params[tokens_L[[0, -1]]] @ item_VD.T).max(axis=0)
        items, scores = in_order(score_V, set(np.flatnonzero(allowed_V)) - set(seen_S), top_k)
        assert item_BK[b, : len(items)].tolist() == items
        np.testing.assert_array_equal(score_BK[b], scores)


@on_eight
def test_a_nan_of_any_device_is_told():
    mesh = sharding.make_mesh(2, 4)
    item_VD = np.ones((30, WIDTH), np.float32)
    item_VD[20] = np.nan
    model = serve.Model(query_of_row, highest, jnp.asarray(item_VD[:9]), None, 4, mesh=mesh)
    ids = ['', *map(str, range(1, 30))]
    for broken, told in ((20, True), (0, False)):
        table_VD = np.ones_like(item_VD)
        table_VD[broken] = np.nan
        shared = model._replace(item_VD=rows_of(table_VD, mesh))
        recommender = serve.Recommender(shared, ids, np.ones(30))
        if told:
            with pytest.raises(FloatingPointError, match='NaN'):
                recommender.recommend(['3'])
        else:
            assert recommender.recommend(['3'], 4).items == ['1', '2', '4', '5']


def some_ranked(num_items, rows=8, seed=0, whole=True):
    """Queries, item vectors, targets and seen items; each item of the second half is a twin."""
    draw = np.random.default_rng(seed)
    query_BQD = draw.normal(size=(rows, 2, 24))
    item_VD = draw.normal(size=(num_items + 1, 24))
    if whole:  # products of small numbers are exact, and often alike
        query_BQD, item_VD = np.round(query_BQD), np.round(item_VD)
    half = num_items // 2
    item_VD[1 + num_items - half :] = item_VD[1 : half + 1]
    target_B = draw.integers(1, num_items + 1, rows).astype(np.int32)
    seen_BS = np.zeros((rows, 6), np.int32)
    for row in seen_BS:
        some = draw.choice(num_items, min(5, num_items), replace=False) + 1
        row[: len(some)] = some
        draw.shuffle(row)
    return query_BQD.astype(np.float32), item_VD.astype(np.float32), target_B, seen_BS


@functools.partial(jax.jit, static_argnames=('num_items', 'eval_items', 'mesh'))
def divided(query_BQD, item_VD, target_B, seen_BS, **options):
    return evaluate.rank_divided(query_BQD, item_VD, target_B, seen_BS, highest, **options)


def at_once(query_BQD, item_VD, target_B, seen_BS):
    score_BV = np.einsum('BQD,VD->BQV', query_BQD, item_VD).max(axis=1)
    return jax.jit(evaluate.rank)(score_BV, target_B, seen_BS)


@on_eight
@given(
    mesh=st.sampled_from(MESHES),
    num_items=st.integers(1, 40),
    eval_items=st.integers(1, 41),
    seed=st.integers(0, 99),
)
@settings(max_examples=EXAMPLES, deadline=None)
@example(mesh=(1, 8), num_items=3, eval_items=1, seed=0)  # devices that have nobody's rows alone
@example(mesh=(2, 4), num_items=33, eval_items=4, seed=1)  # a last block that overlaps
@example(mesh=(4, 2), num_items=33, eval_items=16, seed=2)
@example(mesh=(8, 1), num_items=40, eval_items=39, seed=3)
@example(mesh=(1, 8), num_items=40, eval_items=5, seed=4)
def test_ranks_in_blocks_of_each_device_are_the_ranks(mesh, num_items, eval_items, seed):
    data = some_ranked(num_items, seed=seed)
    query_BQD, item_VD, *others = data
    mesh = sharding.make_mesh(*mesh)
    options = {'num_items': num_items, 'eval_items': eval_items, 'mesh': mesh}
    found = divided(query_BQD, rows_of(item_VD, mesh), *others, **options)
    for one, many in zip(at_once(*data), found):
        np.testing.assert_array_equal(many, one)
        assert many.dtype == one.dtype


@on_eight
@pytest.mark.parametrize('eval_items', [0, 7])
def test_ties_of_rounded_scores_are_ties_between_devices(eval_items):
    """A target's twin is on another device, and stands beside it to the bit."""
    mesh, num_items = sharding.make_mesh(2, 4), 400
    query_BQD, item_VD, target_B, seen_BS = some_ranked(num_items, whole=False)
    options = {'num_items': num_items, 'eval_items': eval_items, 'mesh': mesh}
    asked = target_B, seen_BS * 0
    _, found, _ = divided(query_BQD, rows_of(item_VD, mesh), *asked, **options)
    score_BV = np.einsum('BQD,VD->BQV', *(x.astype(np.float64) for x in (query_BQD, item_VD)))
    score_BV = score_BV.max(axis=1)[:, 1:]
    target_score_B1 = np.take_along_axis(score_BV, target_B[:, None] - 1, axis=1)
    beside_BV = np.abs(score_BV - target_score_B1) < 1e-12
    assert (beside_BV.sum(axis=1) == 2).all()
    np.testing.assert_array_equal(
        found, ((score_BV > target_score_B1) | beside_BV).sum(axis=1, dtype=np.int32)
    )


@on_eight
@pytest.mark.parametrize('item', [0, 1, 33])
def test_a_nan_in_a_block_of_any_device_is_told(item):
    mesh = sharding.make_mesh(2, 4)
    query_BQD, item_VD, *others = some_ranked(33)
    item_VD[item] = np.nan
    options = {'num_items': 33, 'eval_items': 4, 'mesh': mesh}
    found = divided(query_BQD, rows_of(item_VD, mesh), *others, **options)
    assert (np.asarray(found[2]) == (item > 0)).all()


def compiled_ranks(mesh, num_items, eval_items, rows=8, seen=6):
    like = functools.partial(jax.ShapeDtypeStruct)
    item_VD = like((sharding.table_rows(num_items, mesh), 24), jnp.float32)
    arrays = like((rows, 2, 24), jnp.float32), item_VD, like((rows,), jnp.int32)
    options = {'num_items': num_items, 'eval_items': eval_items, 'mesh': mesh}
    return divided.lower(*arrays, like((rows, seen), jnp.int32), **options).compile()


@on_eight
def test_blocks_of_items_are_counted_without_a_word_to_other_devices():
    """Who says something is the loop over the two passes, or stands outside; none says much."""
    compiled = compiled_ranks(sharding.make_mesh(2, 4), 40_000, 100)
    found = collectives(compiled)
    # Found scores; who is ahead and what is broken; the three results, over `data`.
    assert len(found) <= 6
    assert max(size for _, size in found) <= 8 * (1 + 6)  # target's and seen items' scores
    parts = compiled.as_text().split('\n\n')
    talking = [part for part in parts if re.search(r' all-(reduce|gather)\(', part)]
    loops = [part for part in talking if not part.startswith('ENTRY')]
    assert len(loops) == 1 and ' while(' in loops[0]  # over the blocks


@on_eight
def test_a_device_holds_the_scores_of_a_block_and_no_more():
    mesh, rows = sharding.make_mesh(1, 8), 64
    sizes = [
        compiled_ranks(mesh, num_items, 1024, rows).memory_analysis().temp_size_in_bytes
        for num_items in (100_000, 400_000)
    ]
    assert sizes[0] < 6 * 4 * rows * 1024  # the scores of two queries, and what is made of them
    assert abs(sizes[1] - sizes[0]) < 2**16


def compiled_best(encode, combine, params, mesh, num_items, histories, width, top_k=7):
    """What serving asks of eight devices, of rows of 8."""
    split = NamedSharding(mesh, PartitionSpec(sharding.MODEL))
    shape = sharding.table_rows(num_items, mesh), width
    item_VD = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
    row_BL = jax.ShapeDtypeStruct((histories, 8), jnp.int32)
    allowed_V = jax.ShapeDtypeStruct((num_items + 1,), jnp.bool)
    asked = params, item_VD, (row_BL,) * 3, row_BL, allowed_V
    return serve.best.lower(encode, combine, top_k, *asked, mesh=mesh).compile()


@on_eight
@pytest.mark.parametrize('histories', [1, 8])
@pytest.mark.parametrize('data, model', [(2, 4), (1, 8)])
def test_what_goes_between_devices_is_the_best_of_each(data, model, histories):
    """k items and scores a device and history: of 20,001 items a few dozen numbers are sent."""
    mesh = sharding.make_mesh(data, model)
    params = jax.ShapeDtypeStruct((9, WIDTH), jnp.float32)
    compiled = compiled_best(query_of_row, highest, params, mesh, 20_000, histories, WIDTH)
    found = collectives(compiled)
    here = histories if histories % data else histories // data
    assert {kind for kind, _ in found} == {'all-gather'} and len(found) <= 2
    assert max(size for _, size in found) == 7 * model * here


@on_eight
@pytest.mark.parametrize(
    'name, histories',
    [('sasrec', 1), *(pytest.param('fame', n, marks=pytest.mark.slow) for n in (1, 8))],
)
def test_a_model_looks_its_items_up_and_sends_no_table(name, histories):
    """Beside that: the vectors of the items of the histories."""
    mesh = sharding.make_mesh(2, 4)
    config = config_lib.Config(width=8, num_experts=2, num_blocks=1, max_length=8, row_length=8)
    module = build(name, config, 20_000, mesh)
    model = serving.model_of(
        module, sharding.born(functools.partial(initial, module), mesh)(jax.random.key(0)), 8
    )
    held = {shard.data.shape for shard in model.item_VD.addressable_shards}
    assert held == {(sharding.table_rows(20_000, mesh) // 4, 8)}
    compiled = compiled_best(model.encode, model.combine, model.params, mesh, 20_000, histories, 8)
    found = collectives(compiled)
    here = histories if histories % 2 else histories // 2
    assert len(found) <= 3
    assert max(size for _, size in found) == here * 8 * 8


FLAGS = [
    *('--synthetic_users=70', '--synthetic_items=45', '--k_core=0', '--width=8'),
    *('--pretrain_epochs=1', '--finetune_epochs=1', '--num_experts=2', '--max_length=12'),
    *('--rows_per_step=8', '--row_length=16', '--num_blocks=1', '--progress=none'),
]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(model) -> its run on one device, with what it recommends to everybody."""

    @functools.cache
    def train(model):
        folder = tmp_path_factory.mktemp(model)
        made = 'pretrain,finetune' if model == 'fame' else 'pretrain'
        use(folder, f'prepare,{made},recommend', *FLAGS, f'--model={model}')
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
        pytest.param('atten_mixer', (2, 4), marks=pytest.mark.slow),  # of several queries
        pytest.param('bert4rec', (8, 1), marks=pytest.mark.slow),  # with a bias beside the vectors
    ],
)
def test_the_stage_recommends_what_one_device_does(model, mesh, trained, tmp_path):
    folder, path = trained(model), tmp_path / 'out.jsonl'
    flags = [f'--data_parallel={mesh[0]}', f'--model_parallel={mesh[1]}']
    use(folder, 'recommend', *flags, f'--recommendations={path}')
    for one, many in zip(lines(folder / 'recommendations.jsonl'), lines(path), strict=True):
        np.testing.assert_allclose(many.pop('scores'), one.pop('scores'), rtol=1e-4, atol=1e-5)
        assert one == many


@on_eight
def test_vectors_lie_apart_where_a_mesh_is_asked_for_and_nowhere_else(trained):
    flags = [f'--workdir={trained("sasrec")}', '--stages=recommend', '--progress=none']
    shared = run.open_run(config_lib.parse([*flags, '--model_parallel=4']))
    for mesh, rows in ((shared.mesh, 48 // 4), (None, 46)):
        model = serving.open_recommender(shared, mesh).model
        assert model.mesh is mesh
        for array_VD in (model.item_VD, model.params['item_table']):
            assert {shard.data.shape for shard in array_VD.addressable_shards} == {(rows, 8)}


@pytest.mark.slow
@on_eight
def test_a_mesh_does_for_all_that_use_a_run(trained, tmp_path):
    """Judging goes in blocks there; export and explain take one device."""
    folder, told = trained('fame'), []
    for i, flags in enumerate([[], ['--model_parallel=4', '--data_parallel=2', '--eval_items=5']]):
        flags = [
            *flags,
            '--top_k=3',
            f'--export={tmp_path}/{i}',
            f'--explanation={tmp_path}/why{i}',
        ]
        use(folder, 'evaluate,explain,export', *flags)
        results = folder / 'results.json'
        told.append(json.loads(results.read_text())['results'])
        results.unlink()
        told[i]['why'] = json.loads((tmp_path / f'why{i}.json').read_text())
        told[i]['export'] = serve.load_export(tmp_path / str(i)).recommend(['1'], 3)
    assert told[0] == told[1]
