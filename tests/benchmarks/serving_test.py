"""benchmarks/serving.py at the smallest sizes."""

import json

import numpy as np
import pytest

from benchmarks import serving
from fame_jax.serving import export

SMALL = {'width': 4, 'num_blocks': 1, 'num_heads': 2, 'num_experts': 2, 'max_length': 16}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(serving, 'RECIPE', SMALL)


def test_histories_are_as_long_as_those_of_toys():
    histories = serving.make_histories(5000, 1000)
    lengths = np.array([len(history) for history in histories])
    assert np.median(lengths) == pytest.approx(6, abs=1) and lengths.min() == 5
    assert lengths.mean() == pytest.approx(8.6, abs=0.6) and (lengths >= 50).sum() > 10
    items = {int(item) for history in histories for item in history}
    assert min(items) == 1 and max(items) == 1000


def test_rows_take_turns_and_warm_calls_are_not_timed(monkeypatch):
    monkeypatch.setattr(serving, 'TURN', 2)
    log = []
    calls = {name: lambda i, name=name: log.append(f'{name}{i}') for name in 'ab'}
    times = serving.take_turns(calls, [5, 6, 7], [9])
    assert log == ['a9', 'b9', 'a5', 'a6', 'b5', 'b6', 'a7', 'b7']
    assert [of['n'] for of in times.values()] == [3, 3]


def test_given_queries_find_the_items_of_an_explicit_product(small):
    catalogue = serving.Catalogue(60, 3)
    (item_BK, _), *_ = catalogue.search(catalogue.query_BD)
    for query_D, item_K in zip(catalogue.query_BD, np.asarray(item_BK)):
        score_V = np.asarray(catalogue.item_VD)[1:] @ query_D
        assert item_K.tolist() == (np.argsort(-score_V)[: serving.TOP_K] + 1).tolist()
        if catalogue.index:
            assert set(catalogue.index.search(query_D[None], serving.TOP_K)[1][0] + 1) == {*item_K}


def test_model_onnx_finds_the_items_of_the_recommender(small):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    catalogue = serving.Catalogue(60, 3)
    assert catalogue.session
    found = np.concatenate(catalogue.score_by_onnx(catalogue.histories))
    for history, item_K in zip(catalogue.histories, found, strict=True):
        fame = catalogue.recommenders['FAME']
        assert fame.recommend(history, serving.TOP_K, filter_seen=False).items == [
            *map(str, item_K)
        ]


def test_figures_are_written_and_printed(small, monkeypatch, tmp_path, capsys):
    start = {'seconds': 6.5, 'import': 1.0, 'load': 2.0, 'answer': 3.0}
    monkeypatch.setattr(serving, 'first_answer', lambda folder, starts: start)
    path = tmp_path / 'new' / 'a.json'
    serving.main(['--items=60', '--calls=7', '--histories=3', '--batches=2', f'--out={path}'])
    result = json.loads(path.read_text())
    (catalogue,) = result['catalogues']
    one, many = catalogue['one_ms'], catalogue['many_ms']
    assert set(many) >= {'FAME', 'SASRec', 'query given'} and set(one) - set(many) <= {
        'ONNX Runtime'
    }
    assert all(0 < of['p50'] <= of['p90'] <= of['p99'] for of in one.values())
    for of in many.values():
        assert of['histories_per_second'] == pytest.approx(3 / of['p50'] * 1000)
        assert of['ratio'] == pytest.approx(of['p50'] / many['SASRec']['p50'])
    screen = capsys.readouterr().out
    assert '\n| SASRec | ' in screen and '| FAME, 60 items | 6.50 | 1.00 | ' in screen


@pytest.mark.slow
def test_a_fresh_process_answers(small, tmp_path):
    pytest.importorskip('flatbuffers')
    export.save(serving.make_recommender('fame', 60), tmp_path / 'export')
    seconds = serving.first_answer(tmp_path / 'export', 1)
    parts = seconds['import'] + seconds['load'] + seconds['answer']
    assert 0 < parts < seconds['seconds']  # the interpreter starts too
