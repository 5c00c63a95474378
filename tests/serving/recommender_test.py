"""Recommendations against plain loops, and against the ranks of the evaluation."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from run_fixtures import COUNT_V, ITEM_IDS, NUM_ITEMS, make_fame, make_recommender

from fame_jax.evaluation.ranker import Ranker
from fame_jax.models.registry import MODELS
from fame_jax.serving import recommender as recommender_lib
from fame_jax.serving.recommender import (
    POPULARITY,
    Recommendation,
    Recommender,
    UnknownItemsWarning,
)
from fame_jax.stages.context import abstract_params
from fame_jax.stages.open_recommender import serving_model

pytestmark = pytest.mark.filterwarnings('ignore::fame_jax.serving.recommender.UnknownItemsWarning')


def sum_of_two(score_BQV):
    return score_BQV.sum(axis=1)


def both_ends(params, tokens_BL, positions_BL, segments_BL):
    """Two queries: of the last and of the first item that the model encodes."""
    first_B = jnp.argmax(segments_BL > 0, axis=1)
    first_B = jnp.take_along_axis(tokens_BL, first_B[:, None], axis=1)[:, 0]
    return jnp.stack([params[tokens_BL[:, -1]], params[first_B]], axis=1)


def expected(
    params, item_VD, history, k, *, filter_seen=True, allowed=range(1, NUM_ITEMS + 1), two=False
):
    """Ids and scores of one history, by a loop over the items."""
    indices = [ITEM_IDS.index(item) for item in history if item in ITEM_IDS[1:]]
    if not indices:
        order = sorted((-COUNT_V[v], v) for v in allowed)[:k]
    else:
        query_D = params[indices[-1]] + (params[indices[-4:][0]] if two else 0)
        left = [v for v in allowed if not (filter_seen and v in indices)]
        order = sorted((-float(query_D @ item_VD[v]), v) for v in left)[:k]
    return [ITEM_IDS[v] for _, v in order], [-score for score, _ in order]


HISTORIES = [
    ['a'],
    [],
    ['a', 'b', 'c', 'a', 'b'],
    ['unknown'],
    ['7'],
    ['007'],
    ['日本', 'ü', 'unknown', '<b>', '"q"', 'x y'],
    ['d'] * 10_000,
    ['a', 'b', '7', '007'] * 12 + ['c', 'd'],  # fifty
]


@pytest.mark.parametrize('two', [False, True])
@pytest.mark.parametrize('filter_seen', [True, False])
@pytest.mark.parametrize('k', [1, 3, 100])
def test_every_history_gets_its_best_items_in_order(k, filter_seen, two):
    recommender, *arrays = make_recommender(*((both_ends, sum_of_two) if two else ()))
    answers = list(recommender.recommend_many(HISTORIES, k, filter_seen=filter_seen))
    assert len(answers) == len(HISTORIES)
    for history, answer in zip(HISTORIES, answers):
        items, scores = expected(*arrays, history, k, filter_seen=filter_seen, two=two)
        assert answer.items == items
        np.testing.assert_allclose(answer.scores, scores, rtol=1e-5, atol=1e-6)
        assert answer.unknown == [item for item in history if item not in ITEM_IDS[1:]]
        known = len(answer.unknown) < len(history)
        assert answer.fallback == ('' if known else 'popularity')


@pytest.mark.parametrize('two', [False, True])
def test_histories_with_options_of_their_own_share_batches(two):
    """Lists are those of a loop, whatever the other histories of the batch ask for."""
    recommender, params, item_VD = make_recommender(*((both_ends, sum_of_two) if two else ()))
    draw = np.random.default_rng(2)
    all_V, _ = recommender.candidate_mask()
    requests, expectations = [], []
    for n in range(90):
        history = draw.choice([*ITEM_IDS[1:], 'whom'], draw.integers(0, 7)).tolist()
        k, filter_seen = int(draw.integers(1, NUM_ITEMS + 1)), bool(n % 2)
        allowed_V = all_V if n % 3 else (draw.random(NUM_ITEMS + 1) < 0.5) & all_V
        indices, unknown = recommender.to_indices(history)
        request = recommender_lib.HistoryRequest(indices, unknown, k, filter_seen, allowed_V)
        requests.append(request)
        allowed = np.flatnonzero(allowed_V).tolist()
        expectations.append((history, k, filter_seen, allowed))
    answers = recommender.recommend_each(requests)
    assert len(answers) == 90 and recommender.recommend_each([]) == []
    for answer, (history, k, filter_seen, allowed) in zip(answers, expectations):
        assert answer.unknown == [item for item in history if item == 'whom']
        ids, scores = expected(
            params, item_VD, history, k, filter_seen=filter_seen, allowed=allowed, two=two
        )
        assert answer.items == ids
        np.testing.assert_allclose(answer.scores, scores, rtol=1e-4, atol=1e-5)


def test_one_history_is_as_among_many():
    recommender, *_ = make_recommender()
    for history, answer in zip(HISTORIES, recommender.recommend_many(HISTORIES, 5)):
        alone = recommender.recommend(history, 5)
        assert alone._replace(scores=[]) == answer._replace(scores=[])
        # Another batch may be summed in another order.
        np.testing.assert_allclose(alone.scores, answer.scores, rtol=1e-5, atol=1e-6)


# Candidates


def test_only_allowed_items_that_are_not_denied():
    recommender, *arrays = make_recommender()
    for history in HISTORIES:
        answer = recommender.recommend(history, 5, allow=['a', 'b', 'c', 'who'], deny=['b', 'whom'])
        allowed = [ITEM_IDS.index('a'), ITEM_IDS.index('c')]
        assert answer.items == expected(*arrays, history, 5, allowed=allowed)[0]
    answer = recommender.recommend(['a'], NUM_ITEMS, deny=['c'])
    assert set(answer.items) == set(ITEM_IDS[1:]) - {'a', 'c'}
    assert 'c' not in recommender.recommend([], NUM_ITEMS, deny=['c']).items
    allowed_V, unknown = recommender.candidate_mask(['a', 'who'], ['whom'])
    assert np.flatnonzero(allowed_V).tolist() == [1] and unknown == ['who', 'whom']


def test_nothing_left_is_an_empty_list():
    recommender, *_ = make_recommender()
    assert recommender.recommend(['a'], 5, allow=['a']) == Recommendation([], [], [], '')
    assert recommender.recommend(['a'], 5, allow=[]).items == []


def test_equal_scores_are_in_the_order_of_the_catalogue():
    recommender, *_ = make_recommender()
    equal = recommender.model._replace(item_VD=jnp.ones_like(recommender.model.item_VD))
    items = Recommender(equal, ITEM_IDS, COUNT_V).recommend(['b'], NUM_ITEMS).items
    assert items == [item for item in ITEM_IDS[1:] if item != 'b']


# Ids


@pytest.mark.parametrize('id_type', ['str', 'int'])
def test_integers_and_strings_are_the_same_items(id_type):
    """Known ids come back in the type of the data, unknown ones as they were given."""
    ids = ['', '7', '12', '40', '-3']
    recommender, *_ = make_recommender(item_ids=ids, count_V=np.arange(5), id_type=id_type)
    kind = {'str': str, 'int': int}[id_type]
    answers = [
        recommender.recommend(history, 9, filter_seen=False, deny=deny, allow=allow)
        for history, deny, allow in (
            (['7', '12', '99'], ['40'], ['7', '12', '40']),
            ([7, 12, 99], [40], [7, 12, 40]),
            (np.array([7, 12, 99]), np.array([40]), np.array([7, 12, 40])),
            ((item for item in ['7', 12, 99]), {'40'}, ('7', 12, '40')),
        )
    ]
    for answer in answers:
        assert set(answer.items) == {kind(7), kind(12)}
        assert [*map(type, answer.items)] == [kind, kind]
        assert answer[:2] == answers[0][:2]
    assert [answer.unknown for answer in answers] == [['99'], [99], [99], [99]]
    assert recommender.similar_items('-3').items == recommender.similar_items(-3).items
    np.testing.assert_array_equal(recommender.query(['7']), recommender.query([7]))
    assert all(type(item) is str for item in recommender.with_string_ids().recommend([7]).items)


@pytest.mark.parametrize('wrong', ['abc', 7, b'abc', [1.5], [True], [None], [['a']]])
def test_what_is_not_a_list_of_ids(wrong):
    recommender, *_ = make_recommender()
    for call in (
        lambda: recommender.recommend(wrong),
        lambda: recommender.recommend(['a'], deny=wrong),
        lambda: recommender.explain(wrong),
    ):
        with pytest.raises(TypeError, match=r'ids come in a list|is not an id'):
            call()


def test_an_unknown_history_warns_once_or_raises():
    recommender, *_ = make_recommender()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        recommender.recommend(['a', 'who'])
        recommender.recommend([])
        assert not caught
        popular = recommender.recommend(['who', 8], 2)
        assert len(list(recommender.recommend_many([['whom']] * 3))) == 3
    assert popular == Recommendation(['b', '007'], [9, 9], ['who', 8], 'popularity', POPULARITY)
    (warning,) = caught
    assert warning.category is UnknownItemsWarning and "['who', 8]" in str(warning.message)
    assert warning.filename == __file__
    with pytest.raises(ValueError, match=r"in the catalogue: \['who', 8\]"):
        recommender.recommend(['who', 8], unknown='raise')
    assert recommender.recommend(['who', 'a'], unknown='raise').unknown == ['who']
    assert recommender.recommend([], unknown='raise').fallback == 'popularity'


# Arguments


def test_wrong_arguments_are_named_before_the_first_history():
    recommender, *_ = make_recommender()
    for k in (0, -1):
        with pytest.raises(ValueError, match=f'k={k}'):
            recommender.recommend_many([['a']], k)
    with pytest.raises(ValueError, match="'popularity' or 'raise'"):
        recommender.recommend_many([['a']], unknown='error')
    with pytest.raises(TypeError, match=r"recommend\(\) got an unexpected keyword argument 'topk'"):
        recommender.recommend(['a'], topk=3)


def test_a_stream_is_answered_while_it_is_read(monkeypatch):
    monkeypatch.setattr(recommender_lib, 'MAX_BATCH', 4)
    recommender, *_ = make_recommender()
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield [ITEM_IDS[1 + read % NUM_ITEMS]]

    answers = recommender.recommend_many(endless(), 1)
    items = [next(answers).items for _ in range(200)]
    assert read <= 200 + 2 * 16 * 4
    for n in range(1, 1 + NUM_ITEMS):
        assert items[n - 1] == recommender.recommend([ITEM_IDS[1 + n % NUM_ITEMS]], 1).items


def test_a_large_catalogue_has_small_batches():
    recommender, *_ = make_recommender()
    assert recommender.batch_size == recommender_lib.MAX_BATCH
    assert [recommender.rows_for(n) for n in (1, 2, 51, 52, 500)] == [1, 8, 8, 64, 64]
    recommender.item_ids = [''] * 4_000_001
    assert recommender.batch_size == 4
    assert [recommender.rows_for(n) for n in (1, 2, 4, 500)] == [1, 4, 4, 4]
    recommender.item_ids = [''] * 10_000_001
    assert recommender.batch_size == 1
    assert recommender.rows_for(500) == 1


def test_a_nan_is_an_error():
    recommender, *_ = make_recommender()
    broken = recommender.model._replace(params=recommender.model.params.at[2].set(jnp.nan))
    recommender = Recommender(broken, ITEM_IDS, COUNT_V)
    assert recommender.recommend(['a']).items
    with pytest.raises(FloatingPointError, match='NaN'):
        recommender.recommend(['b'])


# Similar items and queries


@pytest.mark.parametrize('k', [1, 5, 100])
def test_similar_items_are_those_of_the_largest_cosine(k):
    recommender, _, item_VD = make_recommender()
    for item in (1, NUM_ITEMS):
        cosines = []
        for v in range(1, NUM_ITEMS + 1):
            norms = np.linalg.norm(item_VD[item]) * np.linalg.norm(item_VD[v])
            cosines.append((-float(item_VD[item] @ item_VD[v]) / norms, v))
        order = sorted(entry for entry in cosines if entry[1] != item)[:k]
        answer = recommender.similar_items(ITEM_IDS[item], k)
        assert answer.items == [ITEM_IDS[v] for _, v in order]
        np.testing.assert_allclose(answer.scores, [-c for c, _ in order], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'who'"):
        recommender.similar_items('who')


def cosine_order(view_VK, item, k):
    """Ids and cosines of the items similar to one, by a loop."""
    cosines = []
    for v in range(1, len(view_VK)):
        norms = np.linalg.norm(view_VK[item]) * np.linalg.norm(view_VK[v])
        cosines.append((-float(view_VK[item] @ view_VK[v]) / norms, v))
    order = sorted(entry for entry in cosines if entry[1] != item)[:k]
    return [ITEM_IDS[v] for _, v in order], [-cosine for cosine, _ in order]


def test_similar_items_by_a_head_are_those_of_its_view():
    recommender = make_fame(head_names=['brand', 'genre'])
    item_VD = np.asarray(recommender.model.item_VD)
    lists = set()
    for item in (1, 5, NUM_ITEMS):
        for h, names in ((0, (1, 'brand', np.int64(1))), (1, (2, 'genre'))):
            expected = cosine_order(item_VD[:, 2 * h : 2 * h + 2], item, 5)
            for by in names:
                answer = recommender.similar_items(ITEM_IDS[item], 5, by)
                assert answer.items == expected[0] and answer.score_kind == 'cosine'
                np.testing.assert_allclose(answer.scores, expected[1], rtol=1e-4, atol=1e-6)
            lists.add(tuple(expected[0]))
        by_all = cosine_order(item_VD, item, 5)[0]
        assert recommender.similar_items(ITEM_IDS[item], 5).items == by_all
        lists.add(tuple(by_all))
    assert len(lists) == 9  # no two ways give one list


def test_many_similar_items_are_those_of_each(monkeypatch):
    recommender = make_fame()
    monkeypatch.setattr(recommender_lib, 'MAX_BATCH', 5)
    items = [*ITEM_IDS[1:], 'who', 'a']
    for by in ('all', 2):
        answers = list(recommender.similar_items_many(iter(items), 3, by))
        for item, answer in zip(items, answers, strict=True):
            if item == 'who':
                assert answer == Recommendation([], [], ['who'], '', 'cosine')
                continue
            alone = recommender.similar_items(item, 3, by)
            assert answer.items == alone.items
            np.testing.assert_allclose(answer.scores, alone.scores, rtol=1e-5, atol=1e-6)
    assert list(recommender.similar_items_many([])) == []
    with pytest.raises(TypeError, match='alone'):
        list(recommender.similar_items_many('abc'))


def test_a_head_that_does_not_exist_is_refused_in_one_line():
    fame = make_fame(head_names=['brand', 'genre'])
    old = Recommender(fame.model._replace(facet_HDK=None), ITEM_IDS, COUNT_V)
    assert (fame.facets, old.facets, make_fame().facets) == (
        ['brand', 'genre'],
        [],
        ['head 1', 'head 2'],
    )
    for recommender, wrong, words in (
        (fame, 0, "a number from 1 to 2, or one of 'brand', 'genre'"),
        (fame, 3, 'there is no such head'),
        (fame, True, 'there is no such head'),
        (fame, 'head 1', 'there is no such head'),
        (old, 1, 'the export is of an older version'),
        (make_recommender()[0], 1, "this model has no heads and no branches; use by='all'"),
    ):
        with pytest.raises(ValueError, match=words) as refusal:
            recommender.similar_items('a', 3, wrong)
        assert '\n' not in str(refusal.value)


@pytest.mark.parametrize('two', [False, True])
def test_a_query_scores_as_the_recommender(two):
    recommender, _, item_VD = make_recommender(*((both_ends, sum_of_two) if two else ()))
    for history in (['a'], ['b', 'who', 'a', '7', 'ü', 'c']):
        query_QD = recommender.query(history)
        assert query_QD.shape == (1 + two, 3) and query_QD.dtype == np.float32
        answer = recommender.recommend(history, NUM_ITEMS, filter_seen=False)
        score_V = (query_QD @ item_VD.T).sum(axis=0)
        scores = [score_V[ITEM_IDS.index(item)] for item in answer.items]
        np.testing.assert_allclose(answer.scores, scores, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match='query: none of'):
        recommender.query(['who'])


# Against the evaluation

# One of each way to make queries and scores.
QUICK = ('fame', 'bert4rec', 'msgifsr')


@pytest.mark.parametrize(
    'model', [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in MODELS]
)
def test_places_in_the_list_are_the_ranks_of_the_evaluation(model, tiny_run):
    """Each test target's place in the full list, for every user and both protocols."""
    run, module, params = tiny_run(model)
    ranks = Ranker(module, abstract_params(module), run.eval_batches)(params, 'test')
    data = run.data
    served = serving_model(module, params, run.config.data.max_length)
    recommender = Recommender(served, data.item_ids, np.ones(data.num_items + 1))
    whole = [
        [data.item_ids[item] for item in data.items[start:end]]
        for start, end in zip(data.offsets[:-1], data.offsets[1:])
    ]
    for filter_seen, rank_U in ((True, ranks.masked), (False, ranks.unmasked)):
        before = (history[:-1] for history in whole)
        answers = recommender.recommend_many(before, data.num_items, filter_seen=filter_seen)
        for history, answer, rank in zip(whole, answers, rank_U):
            if filter_seen and history[-1] in history[:-1]:
                assert history[-1] not in answer.items and rank == data.num_items
                continue
            score = answer.scores[answer.items.index(history[-1])]
            assert rank == sum(other >= score for other in answer.scores)
