"""Recommendations against plain loops, and against the judge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fame_jax import config as config_lib
from fame_jax import run as run_lib
from fame_jax import serve, serving, stages
from fame_jax.models.build import MODELS, initial

V = 12
IDS = ['', 'a', 'b', '7', '007', 'ü', '日本', 'x y', '"q"', '<b>', 'ab', 'c', 'd']
COUNT_V = np.array([0, 3, 9, 1, 9, 0, 2, 7, 4, 8, 5, 6, 1])


def last_item(params, tokens_BL, positions_BL, segments_BL):
    """A query that is a row of the parameters, the last item's."""
    return params[tokens_BL[:, -1]][:, None]


def sum_of_two(score_BQV):
    return score_BQV.sum(axis=1)


def both_ends(params, tokens_BL, positions_BL, segments_BL):
    """Two queries: the last item's and the first's of what the model sees."""
    first_B = jnp.argmax(segments_BL > 0, axis=1)
    first_B = jnp.take_along_axis(tokens_BL, first_B[:, None], axis=1)[:, 0]
    return jnp.stack([params[tokens_BL[:, -1]], params[first_B]], axis=1)


def make(encode=last_item, combine=serve.only_query, max_length=4, seed=0):
    draw = np.random.default_rng(seed)
    params, item_VD = draw.normal(size=(2, V + 1, 3)).astype(np.float32)
    model = serve.Model(encode, combine, jnp.asarray(params), jnp.asarray(item_VD), max_length)
    return serve.Recommender(model, IDS, COUNT_V), params, item_VD


def expected(params, item_VD, history, top_k, *, seen=True, allowed=range(1, V + 1), two=False):
    """One history by hand: (ids, scores)."""
    numbers = [IDS.index(token) for token in history if token in IDS[1:]]
    if not numbers:
        order = sorted((-COUNT_V[v], v) for v in allowed)
        return [IDS[v] for _, v in order[:top_k]], [-count for count, _ in order[:top_k]]
    query_D = params[numbers[-1]] + (params[numbers[-4:][0]] if two else 0)
    scored = []
    for v in allowed:
        if not (seen and v in numbers):
            scored.append((-float(query_D @ item_VD[v]), v))
    scored.sort()
    return [IDS[v] for _, v in scored[:top_k]], [-score for score, _ in scored[:top_k]]


HISTORIES = [
    ['a'],
    [],
    ['a', 'b', 'c', 'a', 'b'],
    ['nobody knows it'],
    ['7'],
    ['007'],
    ['日本', 'ü', 'nobody knows it', '<b>', '"q"', 'x y'],
    ['d'] * 10_000,
    ['a', 'b', '7', '007'] * 12 + ['c', 'd'],  # fifty
]


@pytest.mark.parametrize('two', [False, True])
@pytest.mark.parametrize('filter_seen', [True, False])
@pytest.mark.parametrize('top_k', [1, 3, V, 100])
def test_every_history_gets_its_best_items_in_order(top_k, filter_seen, two):
    recommender, *arrays = make(*((both_ends, sum_of_two) if two else ()))
    answers = list(recommender.recommend_all(HISTORIES, top_k, filter_seen=filter_seen))
    assert len(answers) == len(HISTORIES)
    for history, answer in zip(HISTORIES, answers):
        items, scores = expected(*arrays, history, top_k, seen=filter_seen, two=two)
        assert answer.items == items
        np.testing.assert_allclose(answer.scores, scores, rtol=1e-5, atol=1e-6)
        assert answer.unknown == [token for token in history if token not in IDS[1:]]
        known = len(answer.unknown) < len(history)
        assert answer.fallback == ('' if known else 'popularity')


def test_one_history_is_as_among_many():
    recommender, *_ = make()
    for history, answer in zip(HISTORIES, recommender.recommend_all(HISTORIES, 5)):
        alone = recommender.recommend(history, 5)
        assert alone._replace(scores=[]) == answer._replace(scores=[])
        # Another batch may be summed in another order.
        np.testing.assert_allclose(alone.scores, answer.scores, rtol=1e-5, atol=1e-6)


def test_only_what_is_allowed():
    recommender, *arrays = make()
    allowed_V, unknown = recommender.candidates(['a', 'b', 'c', 'who'], ['b', 'whom'])
    assert unknown == ['who', 'whom'] and np.flatnonzero(allowed_V).tolist() == [1, 11]
    for history in HISTORIES:
        answer = recommender.recommend(history, 5, allowed_V=allowed_V)
        assert answer.items == expected(*arrays, history, 5, allowed=[1, 11])[0]  # fewer than 5
    everything, unknown = recommender.candidates(deny=['c'])
    assert not unknown and everything.sum() == V - 1
    assert 'c' not in recommender.recommend(['a'], V, allowed_V=everything).items


def test_a_string_is_no_history():
    with pytest.raises(TypeError, match='in a list'):
        make()[0].recommend('abc')


def test_nothing_left_is_an_empty_list():
    recommender, *_ = make()
    allowed_V, _ = recommender.candidates(['a'])
    assert recommender.recommend(['a'], 5, allowed_V=allowed_V) == serve.Answer([], [], [], '')


def test_a_stream_is_answered_while_it_comes(monkeypatch):
    """Of an endless stream the first answers are there after a few chunks."""
    monkeypatch.setattr(serve, 'BATCH', 4)
    recommender, *_ = make()
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield [IDS[1 + taken % V]]

    answers = recommender.recommend_all(endless(), 1)
    found = [next(answers).items for _ in range(200)]
    assert taken <= 200 + 2 * 16 * 4
    assert found == [recommender.recommend([IDS[1 + n % V]], 1).items for n in range(1, 201)]


def test_a_large_catalogue_has_small_batches():
    recommender, *_ = make()
    assert recommender.batch == serve.BATCH
    recommender.item_ids = [''] * 10_000_001
    assert recommender.batch == 1


@pytest.mark.parametrize('top_k', [0, -1])
def test_no_list_without_a_place(top_k):
    with pytest.raises(ValueError, match='at least 1'):
        make()[0].recommend(['a'], top_k)


def test_a_nan_is_an_error_and_no_recommendation():
    recommender, *_ = make()
    broken = recommender.model._replace(params=recommender.model.params.at[2].set(jnp.nan))
    recommender = serve.Recommender(broken, IDS, COUNT_V)
    assert recommender.recommend(['a']).items
    with pytest.raises(FloatingPointError, match='NaN'):
        recommender.recommend(['b'])


def test_equal_scores_are_in_the_order_of_the_catalogue():
    recommender, *_ = make()
    alike = recommender.model._replace(item_VD=jnp.ones_like(recommender.model.item_VD))
    recommender = serve.Recommender(alike, IDS, COUNT_V)
    assert recommender.recommend(['b'], V).items == [token for token in IDS[1:] if token != 'b']


# Of each way to make queries and scores one; the others take a minute.
JUDGED = ('fame', 'bert4rec', 'atten_mixer', 'msgifsr')


@pytest.fixture(scope='module')
def tiny_run(tmp_path_factory):
    """(model) -> a run with data and without training, its module and random parameters."""

    def open_it(model):
        flags = ['--progress=none', '--width=8', '--num_experts=2', '--max_length=10']
        flags += ['--row_length=16', '--hidden_width=8', '--levels=2', '--order=2', '--intents=2']
        flags += ['--synthetic_users=60', '--synthetic_items=40', '--synthetic_facets=1']
        workdir = tmp_path_factory.mktemp(model)
        flags += [f'--model={model}', f'--workdir={workdir}', '--eval_users=64']
        run = run_lib.open_run(config_lib.parse(flags))
        stages.prepare(run)
        module = run.module('finetune' if MODELS[model].backbone else 'pretrain')
        params = jax.tree.map(lambda x: 5 * x, initial(module, jax.random.key(1)))
        return run, module, params

    return open_it


@pytest.mark.parametrize(
    'model', [m if m in JUDGED else pytest.param(m, marks=pytest.mark.slow) for m in MODELS]
)
def test_ranks_in_the_list_are_the_judges_ranks(model, tiny_run):
    """The test target's place in the full list, for every user, with and without what was seen."""
    run, module, params = tiny_run(model)
    judged = run_lib.Ranker(run, module)(params, 'test')
    data = run.data
    recommender = serve.Recommender(
        serving.model_of(module, params, run.config.max_length),
        data.item_ids,
        np.ones(data.num_items + 1),
    )
    whole = [
        [data.item_ids[item] for item in data.items[start:end]]
        for start, end in zip(data.offsets[:-1], data.offsets[1:])
    ]
    for filter_seen, rank_U in ((True, judged.masked), (False, judged.unmasked)):
        options = {'filter_seen': filter_seen}
        answers = recommender.recommend_all((h[:-1] for h in whole), data.num_items, **options)
        for history, answer, rank in zip(whole, answers, rank_U):
            if filter_seen and history[-1] in history[:-1]:
                assert history[-1] not in answer.items and rank == data.num_items
                continue
            score = answer.scores[answer.items.index(history[-1])]
            assert rank == sum(other >= score for other in answer.scores)
