"""What serving's benchmark times is what it says, at the smallest sizes."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import serving_bench, serving_latency
from fame_jax import export

SMALL = {'width': 4, 'num_blocks': 1, 'num_heads': 2, 'num_experts': 2, 'max_length': 16}
ITEMS, BATCH = 60, 3  # four rows, one of them empty


@pytest.fixture(scope='module')
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving_bench, 'RECIPE', SMALL)
        yield serving_bench.Bench(ITEMS, BATCH)


def test_histories_are_as_long_as_those_of_toys():
    found = serving_bench.histories(5000, 1000)
    lengths = np.array([len(history) for history in found])
    assert np.median(lengths) == pytest.approx(6, abs=1) and lengths.min() == 5
    assert lengths.mean() == pytest.approx(8.6, abs=0.6) and (lengths >= 50).sum() > 10
    items = {int(item) for history in found for item in history}
    assert min(items) == 1 and max(items) == 1000
    assert serving_bench.histories(5000, 1000) == found


def test_the_device_is_asked_what_recommend_asks_it(bench):
    """Of one history and of many; the shape of no call is left to be compiled in a turn."""
    for name, recommender in bench.recommenders.items():
        for i, history in enumerate(bench.histories):
            item_1K, score_1K = bench.best(name, bench.ones[i])
            answer = recommender.recommend(history, serving_bench.TOP_K)
            assert [recommender.item_ids[item] for item in item_1K[0].tolist()] == answer.items
            assert score_1K[0].tolist() == answer.scores
        answers = bench.answer_all(name, 0)
        for held in bench.many:
            item_BK, _ = bench.best(name, held)
            for row in np.flatnonzero(held.target_B):
                ours = [recommender.item_ids[item] for item in item_BK[row].tolist()]
                assert ours == answers[held.user_B[row]].items
    shapes = {bench.ones[i].seen_BS.shape for i in bench.one_of_each_shape()}
    assert shapes == {held.seen_BS.shape for held in bench.ones}


def test_queries_find_what_an_explicit_product_finds(bench):
    """FAME's own queries; also by FAISS, where it is."""
    item_VD = np.asarray(bench.models['fame'].item_VD)
    found = np.asarray(bench.search(bench.query_BD)[0])
    for query_D, item_K in zip(bench.query_BD, found):
        score_V = item_VD[1:] @ query_D
        assert set(item_K) == set(np.argsort(-score_V)[: serving_bench.TOP_K] + 1)
    if importlib.util.find_spec('faiss') is not None:
        assert bench.agreement() == 1


def test_a_history_alone_has_the_query_it_has_among_many(bench):
    for i, held in enumerate(bench.ones):
        np.testing.assert_allclose(
            np.asarray(bench.encode('fame', held))[0, 0], bench.query_BD[i], rtol=1e-4, atol=1e-4
        )


def test_contenders_take_turns_and_warm_calls_are_not_timed(monkeypatch):
    monkeypatch.setattr(serving_latency, 'TURN', 2)
    told = []
    contenders = {name: lambda i, name=name: told.append(f'{name}{i}') for name in 'ab'}
    times = serving_latency.take_turns(contenders, [5, 6, 7], [9])
    assert told == ['a9', 'b9', 'a5', 'a6', 'b5', 'b6', 'a7', 'b7']
    assert {name: len(several) for name, several in times.items()} == {'a': 3, 'b': 3}


def test_percentiles_are_milliseconds():
    found = serving_latency.percentiles({'a': [0.001, 0.002, 0.003]}, (50, 90))
    assert found == {'a': {'p50': pytest.approx(2), 'p90': pytest.approx(2.8)}}


def test_what_is_left(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(serving_latency, 'Bench', lambda *_: bench)
    start = {'import': 1.0, 'load': 2.0, 'first': 3.0, 'later_ms': 0.5, 'to_first_answer': 6.5}
    monkeypatch.setattr(serving_latency, 'first_answer', lambda folder, starts: start)
    path = tmp_path / 'new' / 'a.json'
    flags = ['--items=60', '--calls=7', f'--batch={BATCH}', '--batches=2', '--export=EXPORT']
    serving_latency.main([*flags, f'--out={path}'])
    told = json.loads(path.read_text())
    assert {'machine', 'load', 'others', 'recipe', 'catalogues'} <= set(told)
    assert told['first_answer'] == {'EXPORT': start}
    (found,) = told['catalogues']
    one, many = found['one_history_ms'], found['all_histories_ms']
    assert set(one) == set(many) and {'rows', 'FAME', 'SASRec scores', 'query given'} < set(one)
    assert all(0 < ms['p50'] <= ms['p90'] <= ms['p99'] for ms in one.values())
    for ms in many.values():
        assert ms['histories_per_second'] == pytest.approx(BATCH / ms['p50'] * 1000)
    for figures, ratios in ((one, 'one_history_ratios'), (many, 'all_histories_ratios')):
        ratio = figures['FAME']['p50'] / figures['SASRec']['p50']
        assert found[ratios]['FAME / SASRec'] == pytest.approx(ratio)
    screen = capsys.readouterr().out
    assert '\n| SASRec on the device | ' in screen and '| EXPORT | 6.50 | 1.00 | ' in screen


@pytest.mark.slow
def test_a_fresh_process_answers(bench, tmp_path):
    pytest.importorskip('flatbuffers')
    export.save(bench.recommenders['fame'], tmp_path / 'export')
    found = serving_latency.first_answer(tmp_path / 'export', 1)
    parts = found['import'] + found['load'] + found['first']
    assert 0 < parts < found['to_first_answer']  # the interpreter starts too
    assert found['later_ms'] < 1000 * found['first']
