"""The demo's server, through real sockets, and its page in a browser where there is one."""

import concurrent.futures
import contextlib
import http.client
import json
import queue
import re
import shutil
import socket
import subprocess
import sys
import threading
import unittest.mock

import pytest
from run_fixtures import make_fame, make_recommender

from fame_jax.serving.demo import server as demo

EVIL = '<script>alert(1)</script><b>bold</b>'
TITLES = ['', 'Lego bricks', 'A box of Lego', 'Legolas, an elf', EVIL, 'שלום', 'Pokémon', '', 'Old']
IDS = ['', 'a', 'b', 'c', 'd', 'e', 'f', 'g7', 'lego']

pytestmark = pytest.mark.filterwarnings('ignore::fame_jax.serving.recommender.UnknownItemsWarning')


@pytest.fixture(scope='module')
def recommender():
    return make_fame(IDS, [0, 5, 9, 7, 3, 2, 2, 8, 1], TITLES)


@contextlib.contextmanager
def serving(recommender, host='127.0.0.1'):
    with demo.listen(host, 0) as server:
        server.demo = demo.Demo(recommender)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope='module')
def server(recommender):
    with serving(recommender) as server:
        yield server


def send(server, path='/', method='GET', body=None, **headers):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    with contextlib.closing(connection):
        headers = {name.replace('_', '-'): value for name, value in headers.items()}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def send_json(server, path, body=None):
    status, _, text = send(server, path, 'POST' if body else 'GET', body and json.dumps(body))
    assert status == 200, text
    return json.loads(text)


def test_the_page_and_the_headers_of_every_answer(server):
    for path, kind in ('/', 'html'), ('/items', 'json'), ('/card', 'json'), ('/no', 'plain'):
        _, headers, body = send(server, path)
        assert headers['Content-Type'].endswith(f'{kind}; charset=utf-8')
        assert headers['X-Content-Type-Options'] == 'nosniff'
        assert headers['Content-Security-Policy'].startswith("default-src 'none'")
        assert 'Access-Control-Allow-Origin' not in headers and 'Python' not in headers['Server']
        assert (b'<!doctype html>' in body) == (path == '/') and b'innerHTML' not in body


def test_the_page_may_run_its_own_script_and_style_only():
    policy = demo.content_policy('<style>a</style><script>b</script>')
    # printf a | openssl dgst -sha256 -binary | base64, and of b
    assert "style-src 'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs='" in policy
    assert "script-src 'sha256-PiPoFgA5WUoziU9lZOGxNIu9egCI1CxKy3PurtWcAJ0='" in policy
    assert 'unsafe' not in policy and policy.startswith("default-src 'none'")


def test_items_by_words(server):
    for query, expected in (
        ('', 'b g7 c a d e f lego'),  # by count; equal counts in the order of the catalogue
        ('lego', 'lego c a b'),  # the id; titles that begin so, by count; the rest
        ('LEGO%20%20box%20', 'b'),
        ('pokemon', 'f'),
        ('%D7%A9%D7%9C', 'e'),
        ('.*', ''),
    ):
        result = send_json(server, f'/items?q={query}')
        assert [entry['item'] for entry in result['items']] == expected.split()
        assert result['total'] == len(expected.split())


def test_a_limited_list_has_titles_and_counts(server):
    entries = [{'item': 'lego', 'title': 'Old', 'count': 1}]
    assert send_json(server, '/items?q=lego&limit=1') == {'items': entries, 'total': 4}
    card = {'model': 'FAME by hand', 'num_items': 8, 'max_length': 5}
    assert send_json(server, '/card') == card


def test_explain_is_that_of_the_recommender(server, recommender):
    body = {'items': ['a', 'zzz', 'b', '<script>', '\ud800'], 'k': 3, 'filter_seen': False}
    expected = recommender.explain(body['items'], 3, filter_seen=False)
    answer = send_json(server, '/explain', body)
    assert answer == json.loads(expected.to_json()) and len(answer['heads']) == 2
    longest = send_json(server, '/explain', {'items': ['a', 'b'] * 500})
    assert (len(longest['history']), longest['too_old']) == (5, 995)
    assert not {'a', 'b'} & {entry['item'] for entry in longest['recommended']}
    empty = send_json(server, '/explain', {'items': []})
    assert empty['fallback'] == 'popularity' and empty['recommended'][0]['score'] == 9
    of_integers, *_ = make_recommender(item_ids=['', '7', '8'], count_V=[0, 2, 1], id_type='int')
    with serving(of_integers) as other:
        answer = send_json(other, '/explain', {'items': ['7']})
        assert answer['recommended'][0]['item'] == '8' and 'heads' not in answer


def test_similar_items_by_all_and_by_each_head(server, recommender):
    for query, item, k in (('item=a', 'a', 20), ('item=g7&limit=3', 'g7', 3)):
        answer = send_json(server, f'/similar_items?{query}')
        title = recommender.titles[IDS.index(item)]
        assert answer['item'] == {'item': item, 'title': title}
        assert [one['by'] for one in answer['lists']] == ['all', 'head 1', 'head 2']
        for one in answer['lists']:
            expected = recommender.similar_items(item, k, one['by'])
            entries = zip(expected.items, expected.titles, expected.scores)
            assert one['items'] == [
                {'item': item, 'title': title, 'score': score} for item, title, score in entries
            ]
    without_heads, *_ = make_recommender(item_ids=['', '7', '8'], count_V=[0, 2, 1], id_type='int')
    with serving(without_heads) as other:
        (alone,) = send_json(other, '/similar_items?item=7')['lists']
        assert (alone['by'], [entry['item'] for entry in alone['items']]) == ('all', ['8'])


REFUSED = {
    404: ['GET /../server.py', 'GET /%2e%2e/', 'POST /card2', 'GET /similar_items?item=zzz'],
    405: ['POST /', 'GET /explain', 'POST /similar_items'],
    501: ['PUT /card'],
    400: [
        'GET /items?limit=0',
        'GET /similar_items?item=a&limit=101',
        'GET /items?limit=%C2%B2',
        'GET /items?' + 'q=a&' * 11,
    ],
    414: ['GET /items?q=' + 'a' * 70_000],
}


@pytest.mark.parametrize('status', REFUSED)
def test_other_routes_methods_and_limits(server, status):
    for request in REFUSED[status]:
        method, path = request.split()
        answer, headers, body = send(server, path, method)
        assert answer == status, request
        assert headers['Content-Type'] == 'text/plain; charset=utf-8' and body.count(b'\n') == 1


LONG = json.dumps({'items': ['a'] * 1001})
BODIES = ['', '{', '\xff', '[]', '{}', '[' * 60_000, '{"items": "a"}', '{"items": [1]}', LONG]
OPTIONS = ['"more": 1', '"k": 0', '"k": 101', '"k": true', '"k": NaN', '"filter_seen": 1']


@pytest.mark.parametrize('body', BODIES + [f'{{"items": [], {option}}}' for option in OPTIONS])
def test_a_body_that_is_refused(server, body):
    status, headers, text = send(server, '/explain', 'POST', body.encode('latin-1'))
    assert status == 400 and headers['Content-Type'] == 'text/plain; charset=utf-8'
    assert text.count(b'\n') == 1 and len(text) < 100


def test_lengths_of_a_body(server):
    for length, status in ('-1', 400), ('x', 400), ('65537', 413), ('9' * 5000, 400):
        assert send(server, '/explain', 'POST', '{}', Content_Length=length)[0] == status
    assert send(server, '/explain', 'POST', '{}', Transfer_Encoding='chunked')[0] == 411


def test_another_host_name_is_refused(server, recommender):
    with serving(recommender, '0.0.0.0') as other:  # which other machines know by any name
        assert send(other, Host='my-machine.lan:8000')[0] == 200
    for host in ('localhost', 'LOCALHOST:9', '127.0.0.1:8000'):
        assert send(server, Host=host)[0] == 200
    for host in ('evil.example', 'localhost.evil.example', 'evil.example@localhost'):
        assert send(server, Host=host)[0] == 403
    assert send(server, Host='localhost:x')[0] == send(server, Host='')[0] == 400


def test_another_web_page_is_refused(server):
    own = f'127.0.0.1:{server.server_address[1]}'
    for origin, status in (f'http://{own}', 200), ('http://127.0.0.1:1', 403), ('null', 403):
        assert send(server, '/card', Host=own, Origin=origin)[0] == status


def test_malformed_requests_are_survived(server):
    for sent in b'\x16\x03\x01\x02', b'GET / HTTP/x\r\n\r\n', b'GET / HTTP/1.1\r\n\r\n':
        with socket.create_connection(server.server_address[:2], timeout=20) as client:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)
            assert b'<!doctype' not in client.makefile('rb').read()


def test_many_clients_at_once_while_others_are_silent(server, recommender, monkeypatch):
    monkeypatch.setattr(demo.Handler, 'timeout', 3)
    silent = [socket.create_connection(server.server_address[:2], timeout=20) for _ in range(20)]
    for client in silent:
        client.sendall(b'GET / HT')
    histories = [[IDS[1 + i % 8], IDS[1 + i // 8 % 8]] for i in range(20)]
    expected = [json.loads(recommender.explain(items).to_json()) for items in histories]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        bodies = [{'items': items} for items in histories]
        assert list(pool.map(lambda b: send_json(server, '/explain', b), bodies)) == expected
    for client in silent:
        assert client.recv(100) == b''  # dropped after the timeout
        client.close()


def test_an_error_in_the_program_is_raised_at_home(server, monkeypatch):
    raised = queue.Queue()
    monkeypatch.setattr(server, 'handle_error', lambda *_: raised.put(sys.exception()))
    monkeypatch.setattr(server.demo, 'explain', lambda items: 1 / 0)
    status, _, text = send(server, '/explain', 'POST', '{"items": []}')
    assert status == 500 and b'ZeroDivision' not in text
    assert isinstance(raised.get(timeout=20), ZeroDivisionError)


def test_mistakes_are_one_line(server, tmp_path, capsys):
    (tmp_path / 'SHA256SUMS').write_text('0  card.json\n')
    port = server.server_address[1]
    for argv, expected in (
        ([], '--export'),
        (['--export=x', '--port=65536'], '--port=65536'),
        (['--export=x', '--port=0', '--host=256.1.1.1'], '256.1.1.1'),
        (['--export=x', f'--port={port}'], f'listening at 127.0.0.1, port {port}: '),
        ([f'--export={tmp_path}/none', '--port=0'], 'none is not an export'),
        ([f'--export={tmp_path}', '--port=0'], 'card.json'),
    ):
        assert demo.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith('error: ') and err.count('\n') == 1 and expected in err, err


def test_the_command_serves_an_export(recommender, tmp_path, monkeypatch, capsys):
    """It is ready after its warm-up, and warns where other machines can reach it."""
    recommender.export(tmp_path)
    interrupt = unittest.mock.Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(demo.Server, 'serve_forever', interrupt)
    for host, warns in ('127.0.0.1', False), ('0.0.0.0', True):
        flags = [f'--export={tmp_path}', '--port=0', f'--host={host}']
        monkeypatch.setattr(sys, 'argv', ['fame_jax_demo', *flags])
        with pytest.raises(SystemExit) as end:
            demo.cli()
        out, err = capsys.readouterr()
        assert end.value.code == 130 and ('there is no password' in err) == warns
        assert 'demo: compiling, so that no click waits for it' in err and 'compiled in' in err
        assert out.startswith(f'demo: FAME by hand, 8 items, http://{host}:')


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('chromium'), reason='no chromium')
def test_the_page_in_a_browser(server, tmp_path):
    flags = ['--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}']
    flags += ['--disable-background-networking', '--disable-component-update', '--disable-sync']
    flags += ['--virtual-time-budget=20000', '--dump-dom', f'{server.url}/#items=d,e,zzz']
    shown = subprocess.run(['chromium', *flags], capture_output=True, text=True, timeout=120).stdout
    shown = re.sub(' (title|aria-label)="[^"]*"', '', shown)
    assert '<bdi dir="auto">&lt;script&gt;alert(1)&lt;/script&gt;&lt;b&gt;bold' in shown
    assert '<bdi dir="auto" class="id">zzz</bdi>' in shown and '<b>bold' not in shown
    recommended = shown[shown.index('<ol id="recommended"') : shown.index('<section id="why"')]
    assert recommended.count('<li>') == 6  # of 8, without the two of the history
    assert shown.count('<h3>') == 3 and 'Head 2 · 75' in shown
