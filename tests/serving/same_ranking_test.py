"""All ways to a ranking give one: of the run, its export, files, indices and services."""

import contextlib
import http.client
import json
import threading

import numpy as np
import pytest
from run_fixtures import SMALL_RUN

import fame_jax as fj
from fame_jax.main import main
from fame_jax.serving import export
from fame_jax.serving.demo import server as demo

K = 10


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a trained FAME, with its lists and its export."""
    folder = tmp_path_factory.mktemp('ranking') / 'run'
    stages = '--stages=prepare,pretrain,finetune,recommend,export'
    assert main([*SMALL_RUN, stages, f'--top_k={K}', f'--workdir={folder}']) == 0
    return folder


@pytest.fixture(scope='module')
def histories(run):
    """Every user's history."""
    return [items for _, items in fj.Dataset.load(run / 'dataset').histories()]


@pytest.fixture(scope='module')
def whole(run, histories):
    """The run's ranking of all unseen items for every history."""
    recommender = fj.load(run)
    return list(recommender.recommend_many(histories, recommender.num_items))


# One function for each way: (folder of the run, histories) -> ids of K unseen items, best first.
# Another service needs its function here and a row in WAYS, and nothing else.


def one_by_one(run, histories):
    recommender = fj.load(run)
    return [recommender.recommend(history, K).items for history in histories]


def of_export(run, histories):
    return [answer.items for answer in fj.load(run / 'export').recommend_many(histories, K)]


def of_file(run, histories):
    lines = (run / 'recommendations.jsonl').read_text().splitlines()
    return [json.loads(line)['items'] for line in lines]


def of_onnx(run, histories):
    """As in docs/serving.md: numpy and ONNX Runtime alone."""
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    ids = json.loads((run / 'export' / 'ids.json').read_text())['items']
    session = onnxruntime.InferenceSession(str(run / 'export' / 'model.onnx'))
    width, lists = session.get_inputs()[0].shape[1], []
    for history in histories:
        indices = [ids.index(item) for item in history]
        row = np.zeros((1, width), np.int32)
        row[0, : len(indices[-width:])] = indices[-width:]
        (score_BV,) = session.run(['scores'], {'items': row})
        score_BV[0, indices] = -np.inf
        lists.append([ids[index] for index in np.argsort(-score_BV[0], kind='stable')[:K]])
    return lists


def of_faiss(run, histories):
    faiss = pytest.importorskip('faiss')
    recommender, lists = export.load(run / 'export'), []
    index = faiss.read_index(str(run / 'export' / 'items.faiss'))
    for history in histories:
        _, index_QV = index.search(recommender.query(history), recommender.num_items)
        best = recommender.to_ids(index_QV[0])
        lists.append([item for item in best if item not in set(history)][:K])
    return lists


def of_demo(run, histories):
    lists = []
    with demo.listen('127.0.0.1', 0) as server:
        server.demo = demo.Demo(export.load(run / 'export'))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        for history in histories:
            body = json.dumps({'items': history, 'k': K})
            connection = http.client.HTTPConnection(*server.server_address, timeout=60)
            with contextlib.closing(connection):
                connection.request('POST', '/explain', body)
                answer = json.loads(connection.getresponse().read())
            lists.append([entry['item'] for entry in answer['recommended']])
        server.shutdown()
        thread.join()
    return lists


def of_service(run, histories):
    pytest.importorskip('starlette')
    pytest.importorskip('uvicorn')
    from service_fixtures import serving

    with serving(run / 'export') as served:
        answers = [served.post('/recommend', {'history': h, 'k': K}) for h in histories]
    return [answer['recommendations'][0]['items'] for answer in answers]


WAYS = (one_by_one, of_export, of_file, of_onnx, of_faiss, of_demo, of_service)


@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.__name__)
def test_every_way_gives_the_ranking_of_the_run(way, run, histories, whole):
    """Items whose scores are equal but for rounding may change places."""
    found = way(run, histories)
    assert len(histories) == 60
    for items, answer in zip(found, whole, strict=True):
        score_of = dict(zip(answer.items, answer.scores))
        assert len(items) == len(set(items)) == K
        scores = [score_of[item] for item in items]
        np.testing.assert_allclose(scores, answer.scores[:K], rtol=1e-4, atol=1e-4)
        assert sum(a != b for a, b in zip(items, answer.items)) <= 2
