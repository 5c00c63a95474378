"""The routes of the HTTP server: answers, limits, errors, tokens, headers and metrics."""

import base64
import contextlib
import http.client
import json
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_fixtures import make_fame
from service_fixtures import IDS, make_exact, serving

from fame_jax.serving import export

pytest.importorskip('starlette')
pytest.importorskip('uvicorn')
pytestmark = pytest.mark.filterwarnings('ignore::fame_jax.serving.recommender.UnknownItemsWarning')

TOKEN = 'correct-horse-battery'
LIMITS = {'body': 5000, 'histories': 3, 'items': 10, 'k': 20}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('service') / 'v1'
    make_exact().export(folder)
    return folder


@pytest.fixture(scope='module')
def recommender(folder):
    return export.load(folder)


@pytest.fixture(scope='module')
def server(folder):
    with serving(folder, **LIMITS) as server:
        yield server


def check(answer, expected):
    """An answer's JSON is that of `Recommender`."""
    assert answer == json.loads(json.dumps(expected._asdict()))


def test_recommend_is_that_of_the_recommender(server, recommender):
    for history, options in (
        (['i3', 'i5'], {}),
        (['i3', 'i5'], {'k': 3, 'filter_seen': False}),
        (['i3'] * 10, {'k': 20, 'deny': ['i1', 'i2']}),
        ([' i3 '], {'allow': ['i7', 'i8', 'i3'], 'deny': None}),
        (['unknown', 7, 7.0, 'i4'], {'k': 1}),
        (['unknown'], {'k': 2, 'deny': ['i9']}),
        ([], {'filter_seen': None}),
    ):
        answer = server.post('/recommend', {'history': history, **options})
        expected = recommender.recommend(
            history, **{'k': 20, **options, 'deny': options.get('deny') or ()}
        )
        assert answer['version'] == 'v1' and len(answer['digest']) == 8
        (found,) = answer['recommendations']
        check(found, expected)
        assert 'unknown_filters' not in answer
    assert found['fallback'] == 'popularity' and found['score_kind'] == 'number of actions'


def test_several_histories_come_back_in_their_order(server, recommender):
    histories = [['i9', 'i1'], [], ['i1', 'i9']]
    answer = server.post('/recommend', {'histories': histories, 'k': 4})
    expected = list(recommender.recommend_many(histories, 4))
    assert len(answer['recommendations']) == 3
    for found, one in zip(answer['recommendations'], expected):
        check(found, one)
    assert expected[0].items != expected[2].items


def test_unknown_ids_of_filters_are_reported_and_those_of_allow_alone_refused(server):
    body = {'history': ['i1'], 'k': 3, 'allow': ['i2', 'x'], 'deny': ['y']}
    answer = server.post('/recommend', body)
    assert answer['unknown_filters'] == ['x', 'y']
    assert answer['recommendations'][0]['items'] == ['i2']
    error = server.post('/recommend', {'history': ['i1'], 'allow': ['x']}, 422)['error']
    assert error['code'] == 'unknown_item' and "'x'" in error['message']


def test_similar_is_that_of_the_recommender(server, recommender):
    for item, k in ('i3', 10), ('i60', 1):
        answer = server.post('/similar', {'item': item, 'k': k})
        expected = recommender.similar_items(item, k)
        check(answer['recommendation'], expected)
        assert len(expected.items) == k and item not in expected.items
    assert server.post('/similar', {'item': 'x'}, 422)['error']['code'] == 'unknown_item'
    assert server.post('/similar', {}, 422)['error']['field'] == 'item'


def test_by_is_passed_on_only_where_it_is_given(server, monkeypatch):
    served, given_by = server.service.versions.current.recommender, []
    plain = served.similar_items

    def similar_items(item, k=10, by='all'):
        given_by.append(by)
        if by == 'nothing':
            raise ValueError('there is no head nothing')
        return plain(item, k)

    monkeypatch.setattr(served, 'similar_items', similar_items)
    server.post('/similar', {'item': 'i3', 'by': 1})
    server.post('/similar', {'item': 'i3'})
    assert given_by == [1, 'all']
    error = server.post('/similar', {'item': 'i3', 'by': 'nothing'}, 422)['error']
    assert error['field'] == 'by' and 'there is no head nothing' in error['message']


def test_health_and_metadata(server, recommender):
    _, _, health = server.send('/health')
    _, _, about = server.send('/metadata')
    assert health == {'status': 'ok', 'version': 'v1', 'digest': about['digest']}
    assert about['card'] == recommender.card and about['num_items'] == 60
    assert about['limits']['items'] == 10


def test_head_is_answered_without_a_body(server):
    assert server.send('/health', 'HEAD')[::2] == (200, b'')


REFUSED = [
    # method, path, body, status, code, a part of the message
    ('GET', '/nowhere', None, 404, 'not_found', '/recommend, /similar'),
    ('GET', '/recommend/', None, 404, 'not_found', ''),
    ('GET', '/recommend', None, 405, 'method_not_allowed', 'POST'),
    ('POST', '/health', '{}', 405, 'method_not_allowed', 'GET'),
    ('POST', '/recommend', '', 400, 'not_json', ''),
    ('POST', '/recommend', '{', 400, 'not_json', ''),
    ('POST', '/recommend', b'\xff', 400, 'not_json', ''),
    ('POST', '/recommend', '[' * 4000, 400, 'not_json', ''),
    ('POST', '/recommend', '{"history": [], "k": NaN}', 400, 'not_json', 'NaN'),
    ('POST', '/recommend', '{"history": [], "k": 1e999}', 400, 'not_json', 'too large'),
    ('POST', '/recommend', '{"history": [], "k": 1, "k": 2}', 400, 'not_json', 'twice'),
    ('POST', '/recommend', '7' * 4500, 400, 'not_json', ''),
    ('POST', '/recommend', '[]', 422, 'invalid', 'object'),
    ('POST', '/recommend', '{}', 422, 'invalid', 'either'),
    ('POST', '/recommend', '{"history": [], "histories": []}', 422, 'invalid', 'either'),
    ('POST', '/recommend', '{"histories": []}', 422, 'invalid', 'at least one'),
    ('POST', '/recommend', '{"history": "i1"}', 422, 'invalid', 'history'),
    ('POST', '/recommend', '{"history": [1.5]}', 422, 'invalid', 'history[0]: 1.5 is not'),
    ('POST', '/recommend', '{"history": [1e999]}', 422, 'invalid', 'history[0]: Infinity'),
    ('POST', '/recommend', '{"histories": [[], [[]]]}', 422, 'invalid', 'histories[1][0]'),
    ('POST', '/recommend', '{"history": [true]}', 422, 'invalid', 'true is not an id'),
    ('POST', '/recommend', '{"history": [], "K": 1}', 422, 'invalid', 'there is no such member'),
    ('POST', '/recommend', '{"history": [], "k": 0}', 422, 'invalid', '1 to 20'),
    ('POST', '/recommend', '{"history": [], "k": 21}', 422, 'invalid', '1 to 20'),
    ('POST', '/recommend', '{"history": [], "k": true}', 422, 'invalid', '1 to 20'),
    ('POST', '/recommend', '{"history": [], "k": 1.0}', 422, 'invalid', '1 to 20'),
    ('POST', '/recommend', '{"history": [], "filter_seen": 1}', 422, 'invalid', 'filter_seen'),
    ('POST', '/recommend', '{"history": [], "deny": [null]}', 422, 'invalid', 'deny[0]'),
    ('POST', '/recommend', '{"histories": [[], [], [], []]}', 422, 'invalid', 'at most 3'),
    ('POST', '/recommend', json.dumps({'history': ['i'] * 11}), 422, 'invalid', 'at most 10'),
    ('POST', '/recommend', json.dumps({'history': ['x' * 5000]}), 413, 'too_large', '5,000'),
    ('POST', '/similar', '{"item": ["i1"]}', 422, 'invalid', 'item'),
    ('POST', '/similar', '{"item": "i1", "by": []}', 422, 'invalid', 'by'),
]


@pytest.mark.parametrize('method, path, body, status, code, part', REFUSED)
def test_what_is_refused(server, method, path, body, status, code, part):
    found, headers, content = server.send(path, method, body)
    assert (found, content['error']['code']) == (status, code)
    assert part in content['error']['message'] and len(content['error']['message']) < 300
    assert headers['Content-Type'] == 'application/json'
    if status == 405:
        assert headers['Allow'].split(', ')[0] in ('POST', 'GET', 'HEAD')
    assert server.send('/health')[0] == 200


def test_other_content_types_are_refused(server):
    body = '{"history": []}'
    for name, value in (
        ('Content-Type', 'text/plain'),
        ('Content-Type', ''),
        ('Content-Type', 'application/json; charset=utf-16'),
        ('Content-Encoding', 'gzip'),
    ):
        assert server.send('/recommend', 'POST', body, {name: value})[0] == 415
    kind = {'Content-Type': 'Application/JSON; charset="UTF-8"'}
    assert server.send('/recommend', 'POST', body, kind)[0] == 200


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(IDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
MEMBERS = ['history', 'histories', 'k', 'filter_seen', 'allow', 'deny', 'item', 'by']
BODIES = st.binary(max_size=50) | st.one_of(
    JSON, st.dictionaries(st.sampled_from(MEMBERS), JSON, max_size=4)
).map(lambda value: json.dumps(value).encode())


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(['/recommend', '/similar']), BODIES)
def test_any_body_is_answered_or_refused(server, path, body):
    status, _, content = server.send(path, 'POST', body)
    assert status in (200, 400, 422), content
    if status == 200:
        given = json.loads(body)
        lists = content.get('recommendations') or [content['recommendation']]
        assert len(lists) == len(given.get('histories', [0]))
        for one in lists:
            assert set(one['items']) <= set(IDS) and np.isfinite(one['scores']).all()
    else:
        assert set(content['error']) >= {'code', 'message'}


def test_a_number_that_is_not_finite_never_appears(folder):
    with serving(folder) as server:
        served = server.service.versions.current.recommender
        broken = np.array(served.model.item_VD)
        broken[5] = np.nan
        served.model = served.model._replace(item_VD=broken)
        bodies = [{'history': ['i1'], 'deny': deny} for deny in ([], ['i5'])]
        error = server.post('/recommend', bodies[0], 500)['error']
        assert error['code'] == 'not_finite'
        assert server.post('/recommend', bodies[1])['recommendations'][0]['items']
        broken[5] = np.inf  # the score of i5 is larger than all others, or minus infinity
        served.model = served.model._replace(item_VD=broken)
        statuses = {server.send('/recommend', 'POST', json.dumps(bodies[0]))[0] for _ in 'ab'}
        assert statuses <= {200, 500}


def test_one_faulty_request_of_a_batch_leaves_the_others_alone(folder, recommender):
    with serving(folder) as server:
        served = server.service.versions.current.recommender
        plain, together = served.recommend_each, []
        release = threading.Event()

        def recommend_each(histories):
            release.wait(20)
            together.append(len(histories))
            if any(history.k == 13 for history in histories):
                raise RuntimeError('a fault')
            return plain(histories)

        served.recommend_each = recommend_each
        answers = {}

        def ask(k):
            answers[k] = server.send('/recommend', 'POST', json.dumps({'history': ['i1'], 'k': k}))

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(11, 17)]
        for thread in threads:
            thread.start()
        wait_for(lambda: server.service.metrics.in_flight == 6)
        release.set()
        for thread in threads:
            thread.join()
        assert max(together) > 1
        assert answers[13][0] == 500 and answers[13][2]['error']['code'] == 'internal'
        for k in {*range(11, 17)} - {13}:
            check(answers[k][2]['recommendations'][0], recommender.recommend(['i1'], k))


def wait_for(condition):
    """Waits until a condition holds."""
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError('the condition did not come true')


# Who may ask


def test_a_token_is_needed_where_there_is_one(folder):
    with serving(folder, token=TOKEN) as server:
        for value, status in (
            (f'Bearer {TOKEN}', 200),
            (f'bearer  {TOKEN} ', 200),
            (f'Bearer {TOKEN}x', 401),
            (f'Bearer {TOKEN[:-1]}', 401),
            ('Bearer ', 401),
            ('Bearer é', 401),
            (TOKEN, 401),
            ('Basic ' + base64.b64encode(b'any:' + TOKEN.encode()).decode(), 200),
            ('Basic ' + base64.b64encode(b'any:x' + TOKEN.encode()).decode(), 401),
            ('Basic %', 401),
        ):
            headers = {'Authorization': value.encode('utf-8')}
            for path in '/metadata', '/metrics', '/docs', '/openapi.json', '/nowhere':
                found, about, _ = server.send(path, headers=headers)
                assert found == (404 if (path, status) == ('/nowhere', 200) else status), value
                assert ('WWW-Authenticate' in about) == (found == 401)
        found, _, content = server.send('/recommend', 'POST', '{"history": ["i1"]}')
        assert found == 401 and content['error']['code'] == 'unauthorized'
        assert TOKEN not in json.dumps(content)
        assert server.send('/health')[0] == 200


def test_another_web_page_or_host_name_is_refused(server, folder):
    own = f'127.0.0.1:{server.port}'
    for origin, status in (f'http://{own}', 200), ('http://evil.example', 403), ('null', 403):
        assert server.send('/health', headers={'Origin': origin})[0] == status
    assert server.send('/health', headers={'Host': 'evil.example'})[0] == 200
    assert server.send('/health', headers={'Host': 'a b'})[0] == 400
    with serving(folder, own_hosts={'localhost', '127.0.0.1', '[::1]'}) as local:
        for host, status in (
            ('localhost', 200),
            ('LOCALHOST:99', 200),
            ('[::1]:80', 200),
            ('evil.example', 403),
            ('localhost.evil.example', 403),
        ):
            assert local.send('/health', headers={'Host': host})[0] == status, host


def test_headers_of_every_answer(server):
    for path in '/health', '/nowhere', '/docs', '/metrics':
        _, headers, _ = server.send(path)
        assert headers['X-Content-Type-Options'] == 'nosniff' and headers['Server'] == 'fame_jax'
        assert headers['Cache-Control'] == 'no-store'
        assert len(headers.get_all('Content-Security-Policy')) == 1
        assert headers['Content-Security-Policy'].startswith("default-src 'none'")
        assert 'Access-Control-Allow-Origin' not in headers


# Descriptions


def test_openapi_lists_the_routes_and_examples_that_work(folder, tmp_path):
    make_fame(IDS, np.arange(len(IDS))).export(tmp_path / 'fame')
    for has_demo in False, True:
        with serving(tmp_path / 'fame', token=TOKEN, has_demo=has_demo, items=7) as server:
            headers = {'Authorization': f'Bearer {TOKEN}'}
            _, _, described = server.send('/openapi.json', headers=headers)
            starlette = server.service.app._app
            routes = {
                (route.path, method.lower())
                for route in starlette.routes
                for method in route.methods - {'HEAD'}
            }
            assert {(p, m) for p, methods in described['paths'].items() for m in methods} == routes
            assert (('/', 'get') in routes) == has_demo
            page = server.send('/docs', headers=headers)[2].decode()
            for path, method in routes:
                operation = described['paths'][path][method]
                assert f'{method.upper()} {path}' in page
                body = operation.get('requestBody', {}).get('content', {}).get('application/json')
                if body:
                    example = json.dumps(body['example']).replace('"7"', '"i7"')
                    status, _, content = server.send(path, 'POST', example, headers)
                    assert status == 200, content
                if path != '/health':
                    assert operation['security'] == [{'token': []}]
            schema = described['paths']['/recommend']['post']['requestBody']['content']
            history = schema['application/json']['schema']['properties']['history']
            assert history['maxItems'] == 7
            assert 'http' not in page.replace('curl -H', '') and '<script' not in page


def test_the_page_and_its_routes(tmp_path):
    recommender = make_fame(IDS, np.arange(len(IDS)), [f'title {n}' for n in range(len(IDS))])
    recommender.export(tmp_path / 'fame')
    with serving(tmp_path / 'fame', has_demo=True, k=15) as server:
        _, headers, page = server.send('/')
        assert b'<!doctype html>' in page and headers['Content-Type'].startswith('text/html')
        assert "script-src 'sha256-" in headers['Content-Security-Policy']
        _, _, items = server.send('/items?q=title%2060')
        assert items['items'] == [{'item': 'i60', 'title': 'title 60', 'count': 60}]
        _, _, similar = server.send('/similar_items?item=i7&limit=3')
        assert similar['item']['item'] == 'i7'
        expected = recommender.similar_items('i7', 3).items
        assert [entry['item'] for entry in similar['lists'][0]['items']] == expected
        assert server.send('/similar_items?item=zzz')[0] == 404
        assert server.send('/items?limit=0')[2]['error']['message'].startswith('limit')
        assert server.send('/card')[2]['num_items'] == 60
        answer = server.post('/explain', {'items': ['i1', 'i2'], 'k': 3})
        expected = json.loads(recommender.explain(['i1', 'i2'], 3).to_json())
        assert [e['item'] for e in answer['recommended']] == [
            e['item'] for e in expected['recommended']
        ]
        assert len(answer['heads']) == 2
        assert server.post('/explain', {'items': [1]}, 400)['error']['code'] == 'invalid'
        assert server.post('/explain', {'items': [], 'k': 16}, 422)['error']['limit'] == 15


# Metrics


def test_metrics_count_requests_batches_and_versions(folder):
    with serving(folder) as server:
        for _ in range(3):
            server.post('/recommend', {'histories': [['i1'], ['i2']]})
        server.post('/recommend', {'history': 7}, 422)
        server.send('/nowhere')
        server.send('/elsewhere')
        of = server.metric
        assert of('requests_total{route="/recommend",status="200"}') == 3
        assert of('requests_total{route="/recommend",status="422"}') == 1
        assert of('requests_total{route="other",status="404"}') == 2
        assert of('request_seconds_count{route="/recommend"}') == 4
        assert of('request_seconds_bucket{route="/recommend",le="+Inf"}') == 4
        assert 0 < of('request_seconds_sum{route="/recommend"}') < 20
        assert of('batch_histories_sum') == 6 and of('batch_histories_count') == 3
        assert of('batch_histories_bucket{le="1"}') == 0
        assert of('batch_histories_bucket{le="2"}') == 3
        assert of('waiting_histories') == 0 and of('in_flight') == 1  # the question itself
        digest = server.service.versions.current.digest
        assert of(f'version_info{{version="v1",digest="{digest}"}}') == 1
        assert of('versions_loaded_total') == 1


def test_metrics_have_the_form_that_prometheus_reads(server):
    _, headers, text = server.send('/metrics')
    assert headers['Content-Type'].startswith('text/plain; version=0.0.4')
    kinds = {}
    for line in text.decode().splitlines():
        if line.startswith('# TYPE '):
            _, _, name, kind = line.split()
            kinds[name] = kind
        elif not line.startswith('#'):
            name = line.partition('{')[0].partition(' ')[0]
            for end in ('_bucket', '_sum', '_count'):
                if kinds.get(name.removesuffix(end)) == 'histogram':
                    name = name.removesuffix(end)
            assert name in kinds
            float(line.rpartition(' ')[2])
    assert len(kinds) == 8


def test_a_label_is_escaped():
    from fame_jax.serving.service.metrics import sample

    line = sample('x', 1, {'version': 'a"b\\c\nd\ud800'})
    assert line == r'fame_jax_x{version="a\"b\\c\nd?"} 1'


# Connections


def test_one_connection_answers_many_requests_and_closes_after_a_refused_body(server):
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=20)
    with contextlib.closing(connection):
        for _ in range(3):
            connection.request('GET', '/health')
            answer = connection.getresponse()
            assert answer.status == 200 and answer.read()
            assert answer.headers['Connection'] is None
        connection.request('POST', '/recommend', '{', {'Content-Type': 'application/json'})
        answer = connection.getresponse()
        assert answer.status == 400 and answer.headers['Connection'] == 'close'
