"""Shapes of programs: nothing is compiled after a warm-up, and rounding up changes no list."""

import threading
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_fixtures import ITEM_IDS, last_item, make_fame, make_recommender

from fame_jax.serving import export, rows, topk
from fame_jax.serving.recommender import Recommender, ServedModel, single_query

pytestmark = pytest.mark.filterwarnings('ignore::fame_jax.serving.recommender.UnknownItemsWarning')


@pytest.fixture(scope='module')
def compiled():
    """Names of threads, one for each program that XLA compiles or reads from its cache."""
    threads = []

    def listen(name, _, **about):
        if name == '/jax/core/compile/backend_compile_duration':
            threads.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield threads
    jax.monitoring.unregister_event_duration_listener(listen)


def make_large(num_items, width=3, max_length=70, encode=last_item):
    """A recommender over so many items, whose query is the last item's random vector."""
    draw = np.random.default_rng(0)
    item_VD = jnp.asarray(draw.normal(size=(num_items + 1, width)).astype(np.float32))
    ids = ['', *map(str, range(1, num_items + 1))]
    model = ServedModel(encode, single_query, item_VD, item_VD, max_length)
    return Recommender(model, ids, np.arange(num_items + 1))


@pytest.mark.parametrize('kind', ['model', 'FAME', 'export'])
def test_after_a_warm_up_nothing_is_compiled(kind, compiled, tmp_path):
    """Whatever the length of lists and histories, the filters, and the number of histories."""
    ids = ['', *map(str, range(1, 301))]
    recommender = make_large(300)
    if kind == 'FAME':
        recommender = make_fame(ids, np.arange(301), max_length=20)
    if kind == 'export':
        recommender.export(tmp_path / 'export')
        recommender = export.load(tmp_path / 'export')
    compiled.clear()
    recommender.warm_up(k=100, explain=kind == 'FAME')
    own = threading.current_thread().name
    assert compiled.count(own) > 5
    compiled.clear()
    draw = np.random.default_rng(1)
    for n in range(120):
        length = int(draw.choice([1, 2, 3, 15, 16, 17, 63, 64, 65, 66, 200, 3000]))
        history = draw.integers(1, 320, length).tolist()
        filters = {'filter_seen': bool(n % 2), 'deny': draw.integers(1, 300, n % 7)}
        filters['allow'] = None if n % 3 else draw.integers(1, 300, 1 + n)
        k = int(draw.integers(1, 101))
        assert recommender.recommend(history, k, **filters)
        recommender.similar_items(1 + n, k, n % 3 if kind == 'FAME' and n % 3 else 'all')
        if kind == 'FAME' and n % 4 == 0:
            recommender.explain(history, k, **filters)
        elif n % 10 == 0:
            many = [history[: 1 + place] for place in range(min(n, length))]
            assert len(list(recommender.recommend_many(many, k, **filters))) == len(many)
            recommender.query([*history, 1])
    assert own not in compiled
    recommender.recommend([1], 140)  # the next power of two
    assert compiled.count(own) == 1


def test_the_longest_list_of_a_warm_up_is_at_most_the_catalogue(compiled):
    recommender, *_ = make_recommender()
    recommender.warm_up(k=10**9, batch_sizes=[1])
    own = threading.current_thread().name
    compiled.clear()
    assert len(recommender.recommend(['a'], 10**9).items) == len(ITEM_IDS) - 2
    assert own not in compiled
    for wrong in ({'k': 0}, {'batch_sizes': [0]}):
        with pytest.raises(ValueError, match='0'):
            recommender.warm_up(**wrong)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.booleans(), st.integers(0, 99))
def test_a_shorter_list_is_the_beginning_of_a_longer_one(k, more, filter_seen, seed):
    """Items and scores to the bit, though programs give more items than were wanted; with ties."""
    draw, recommender = np.random.default_rng(seed), TIES
    history = draw.integers(1, 101, 5)
    short = recommender.recommend(history, k, filter_seen=filter_seen)
    long = recommender.recommend(history, k + more, filter_seen=filter_seen)
    left = 100 - len({*history.tolist()}) * filter_seen
    assert (len(short.items), len(long.items)) == (min(k, left), min(k + more, left))
    assert short.items == long.items[:k] and short.scores == long.scores[:k]
    query_BQD = jnp.asarray(recommender.query(history))[None]
    seen = [history if filter_seen else history[:0]]
    bits_BX = rows.candidate_bits(np.arange(101) > 0, seen)
    item_VD = recommender.model.item_VD
    exact = topk.top_k_items(single_query, KS[seed % 2], query_BQD, item_VD, bits_BX)
    whole = recommender.recommend(history, KS[seed % 2], filter_seen=filter_seen)
    exact_ids = recommender.to_ids(np.asarray(exact[0])[0, : len(whole.items)])
    assert exact_ids == whole.items
    assert np.asarray(exact[1])[0, : len(whole.items)].tolist() == whole.scores


KS = (5, 33)  # no powers of two
TIES = make_large(100)
TIES.model.item_VD.block_until_ready()
TIES = Recommender(
    TIES.model._replace(item_VD=jnp.round(TIES.model.item_VD)), TIES.item_ids, TIES.count_V
)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_bits_are_the_candidates(data):
    """Against a loop over rows and items, for any part of the catalogue."""
    num_items = data.draw(st.integers(1, 40))
    item = st.integers(1, num_items)
    allowed_V = np.array([False, *data.draw(st.lists(st.booleans(), min_size=num_items))])
    allowed_V = allowed_V[: num_items + 1]
    seen = data.draw(st.lists(st.lists(item, max_size=50), min_size=1, max_size=3))
    bits_BX = rows.candidate_bits(allowed_V, [np.array(items, np.int32) for items in seen])
    assert bits_BX.shape == (len(seen), num_items // 8 + 1) and bits_BX.dtype == np.uint8
    first = data.draw(st.integers(0, num_items + 9))
    count = data.draw(st.integers(1, num_items + 9))
    with jax.disable_jit():
        found_BV = np.asarray(topk._unpack(jnp.asarray(bits_BX), first, count))
    for b, items in enumerate(seen):
        for place in range(count):
            v = first + place
            expected = v <= num_items and allowed_V[v] and v not in items
            assert found_BV[b, place] == expected


def test_a_history_of_400_000_items_takes_little_memory():
    """As an array of rows with 63 short ones, it would take .3 GB for each copy."""
    recommender = make_large(5000)
    draw = np.random.default_rng(0)
    heavy = draw.integers(1, 4990, 400_000).tolist()
    histories = [heavy, *([1 + n, 2 + n] for n in range(63))]
    list(recommender.recommend_many([[1]] * 64, 20))
    tracemalloc.start()
    answers = list(recommender.recommend_many(histories, 20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6
    assert not {*heavy} & {*map(int, answers[0].items)}
    alone = recommender.recommend(heavy, 20)
    assert alone.items == answers[0].items and len(alone.items) == 11 + 4989 - len({*heavy})


def test_a_stream_of_long_histories_is_not_read_far_ahead():
    recommender, read = make_large(100), 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield ['7'] * 200_000

    answers = recommender.recommend_many(endless(), 1)
    for _ in range(8):
        next(answers)
    assert read <= 8 + 2 * 6  # a million items each time


def test_requests_do_not_wait_while_another_shape_is_compiled(compiled):
    """A program is compiled once, though two threads need it; a compiled one answers meanwhile."""
    started, go_on = threading.Event(), threading.Event()

    def slow(params, tokens_BL, positions_BL, segments_BL):
        if tokens_BL.shape[1] > 16:  # traced in place of a long compilation
            started.set()
            assert go_on.wait(60)
        return params[tokens_BL[:, -1]][:, None]

    recommender = make_large(50, encode=slow)
    recommender.recommend([1])
    threads = [
        threading.Thread(target=recommender.recommend, args=([1] * 20,), name=f'long {n}')
        for n in range(2)
    ]
    compiled.clear()
    for thread in threads:
        thread.start()
    assert started.wait(60)
    expected = recommender.recommend([2])
    assert recommender.recommend([2], filter_seen=False).items and expected.items
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert sum(name.startswith('long') for name in compiled) == 1
