"""The demo's server, asked by real sockets, and its page in a real browser where there is one."""

import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from fame_jax import demo
from fame_jax.catalogue import Catalogue
from fame_jax.explain import explain
from fame_jax.serve import Model, Recommender, only_query

TITLES = [
    '',
    'Lego bricks',
    'A box of Lego',
    'Legolas, an elf',
    '<script>alert(1)</script><b>bold</b>',
    'שלום עולם',
    'Pokémon cards',
    '',
    'Old Lego',
]
IDS = ['', 'a', 'b', 'c', 'd', 'e', 'f', 'g7', 'lego']
COUNTS = [0, 5, 9, 7, 3, 2, 2, 8, 1]

# A model by hand: the query is the latest item's vector, and two heads have a half of it each.
VECTORS = np.random.default_rng(0).normal(size=(len(IDS), 4)).astype(np.float32)


def encode(params, tokens_BL, positions_BL, segments_BL):
    return params[tokens_BL[:, -1:]]


def look(params, tokens_BL, positions_BL, segments_BL):
    batch, length = tokens_BL.shape
    latest_BD = params[tokens_BL[:, -1]]
    first_D = jnp.arange(4) < 2
    attention_L = segments_BL / segments_BL.sum(1, keepdims=True)
    return {
        'gate_BH': jnp.full((batch, 2), 0.5),
        'head_BHD': 2 * jnp.stack([latest_BD * first_D[None], latest_BD * ~first_D[None]], 1),
        'router_BHN': jnp.full((batch, 2, 3), 1 / 3),
        'positions_BLHN': jnp.full((batch, length, 2, 3), 1 / 3),
        'attention_BHNL': jnp.broadcast_to(attention_L[:, None, None], (batch, 2, 3, length)),
    }


def a_recommender(heads=True):
    vectors = jnp.asarray(VECTORS)
    model = Model(encode, only_query, vectors, vectors, 5, look if heads else None)
    return Recommender(model, IDS, np.array(COUNTS), TITLES, {'model': 'FAME (by hand)'})


@pytest.fixture(scope='module')
def recommender():
    return a_recommender()


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
    with serving(recommender) as one:
        yield one


def ask(server, path='/', method='GET', body=None, **headers):
    """Status, headers and body of an answer."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    try:
        headers = {name.replace('_', '-'): value for name, value in headers.items()}
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def ask_json(server, path, body=None, **headers):
    method = 'GET' if body is None else 'POST'
    status, _, text = ask(server, path, method, body and json.dumps(body), **headers)
    assert status == 200, text
    return json.loads(text)


def ask_raw(server, sent, half=False, timeout=20):
    """What comes back to bytes sent as they are; half: and the client says no more."""
    with socket.create_connection(server.server_address[:2], timeout=timeout) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
        if half:
            client.shutdown(socket.SHUT_WR)
        got = b''
        with contextlib.suppress(ConnectionError):
            while part := client.recv(65536):
                got += part
        return got


def found(server, query, **more):
    path = f'/items?q={query}' + ''.join(f'&{name}={value}' for name, value in more.items())
    return [item['item'] for item in ask_json(server, path)['items']]


# The routes


def test_the_page(server):
    status, headers, body = ask(server)
    assert status == 200
    assert headers['Content-Type'] == 'text/html; charset=utf-8'
    assert b'<!doctype html>' in body
    assert 'innerHTML' not in body.decode()
    assert 'http://' not in body.decode().replace('http://www.w3.org/2000/svg', '')


def test_the_page_runs_its_own_script_and_no_other():
    policy = demo.content_policy('<style>a</style><script>b</script>')
    # printf a | openssl dgst -sha256 -binary | base64, and of b
    assert "style-src 'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs='" in policy
    assert "script-src 'sha256-PiPoFgA5WUoziU9lZOGxNIu9egCI1CxKy3PurtWcAJ0='" in policy
    assert 'unsafe' not in policy
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize('path', ['/', '/items', '/card', '/nothing'])
def test_every_answer_has_its_safe_headers(server, path):
    _, headers, _ = ask(server, path)
    assert headers['X-Content-Type-Options'] == 'nosniff'
    assert headers['Cache-Control'] == 'no-store'
    assert headers['Content-Security-Policy'].startswith("default-src 'none'")
    assert headers['Content-Type'].endswith('charset=utf-8')
    assert 'Access-Control-Allow-Origin' not in headers
    assert 'Python' not in headers['Server']


def test_the_card(server):
    card = ask_json(server, '/card')
    assert card == {'model': 'FAME (by hand)', 'num_items': 8, 'max_length': 5, 'facets': True}


@pytest.mark.parametrize(
    ('query', 'expected'),
    [
        ('', ['b', 'g7', 'c', 'a', 'd', 'e', 'f', 'lego']),  # by count; of equals the first
        ('lego', ['lego', 'c', 'a', 'b']),  # the id; titles that begin so, by count; the rest
        ('LEGO%20box', ['b']),
        ('box%20lego', ['b']),
        ('lego%20%20Lego%20', ['b', 'c', 'a', 'lego']),  # no title begins so
        ('olas', ['c']),
        ('g7', ['g7']),
        ('pokemon', ['f']),
        ('%D7%A9%D7%9C%D7%95%D7%9D', ['e']),
        ('%3Cscript%3E', ['d']),
        ('nothing', []),
        ('.*', []),
        ('%FF%00', []),
    ],
)
def test_items_by_words(server, query, expected):
    assert found(server, query) == expected


def test_items_are_told_with_their_titles_and_counts(server):
    assert ask_json(server, '/items?q=lego&limit=1') == {
        'items': [{'item': 'lego', 'title': 'Old Lego', 'count': 1}],
        'total': 4,
    }


def test_a_word_that_begins_a_word_comes_first():
    many = Recommender(
        a_recommender().model, ['', '1', '2'], np.array([0, 9, 1]), ['', 'my train', 'a rain']
    )
    items = Catalogue(many).find('rain', 9)['items']
    assert [item['title'] for item in items] == ['a rain', 'my train']


@pytest.mark.parametrize('limit', ['0', '-1', '101', 'x', '1e1', '%C2%B2', '9' * 400])
def test_a_limit_that_is_none(server, limit):
    assert ask(server, f'/items?limit={limit}')[0] == 400


def test_too_many_fields(server):
    assert ask(server, '/items?' + 'q=a&' * 11)[0] == 400


def test_explain_is_explain(server, recommender):
    asked = {'items': ['a', 'zzz', 'b'], 'top_k': 3, 'filter_seen': False}
    expected = explain(recommender, ['a', 'zzz', 'b'], 3, filter_seen=False)
    assert ask_json(server, '/explain', asked) == json.loads(json.dumps(expected))
    assert len(expected['heads']) == 2


def test_explain_has_its_defaults(server, recommender):
    told = ask_json(server, '/explain', {'items': ['a', 'b']})
    assert [entry['item'] for entry in told['recommended']] == [
        entry['item'] for entry in explain(recommender, ['a', 'b'])['recommended']
    ]
    assert not {'a', 'b'} & {entry['item'] for entry in told['recommended']}


def test_an_empty_history_gets_the_popular_items(server):
    told = ask_json(server, '/explain', {'items': []})
    assert told['fallback'] == 'popularity'
    assert told['recommended'][0] == {'item': 'b', 'title': 'A box of Lego', 'score': 9.0}


def test_a_model_without_heads():
    with serving(a_recommender(heads=False)) as server:
        told = ask_json(server, '/explain', {'items': ['a']})
        assert told['recommended'] and 'heads' not in told
        assert not ask_json(server, '/card')['facets']


def test_titles_go_as_they_are(server):
    told = ask_json(server, '/explain', {'items': ['d', 'e', 'g7']})
    assert [entry['title'] for entry in told['history']] == [TITLES[4], TITLES[5], '']


# What is refused


@pytest.mark.parametrize(
    'path',
    ['/demo.py', '/../fame_jax/demo.py', '/%2e%2e/', '//', '/items/', '/explain2', '/.git/config'],
)
def test_nothing_else_is_there(server, path):
    status, headers, body = ask(server, path)
    assert (status, body.count(b'\n')) == (404, 1) or (path == '//' and status == 200)
    assert headers['Content-Type'] in ('text/plain; charset=utf-8', 'text/html; charset=utf-8')


def test_an_address_in_full_is_no_route(server):
    sent = b'GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n'
    assert ask_raw(server, sent).startswith(b'HTTP/1.0 404')


@pytest.mark.parametrize(
    ('method', 'path', 'allowed'),
    [
        ('POST', '/', 'GET'),
        ('PUT', '/card', 'GET'),
        ('HEAD', '/', 'GET'),
        ('OPTIONS', '/explain', 'POST'),
        ('GET', '/explain', 'POST'),
        ('BREW', '/items', 'GET'),
    ],
)
def test_other_methods(server, method, path, allowed):
    status, headers, _ = ask(server, path, method)
    assert (status, headers['Allow']) == (405, allowed)


@pytest.mark.parametrize(
    'body',
    [
        b'',
        b'{',
        b'\xff\xfe',
        b'NaN',
        b'[]',
        b'"items"',
        b'{}',
        b'null',
        b'[' * 60_000,
        b'{"items":' * 7_000,
        b'{"items": [], "top_k": ' + b'9' * 5_000 + b'}',
        b'{"items": "a"}',
        b'{"items": {"a": 1}}',
        b'{"items": [1]}',
        b'{"items": [["a"]]}',
        b'{"items": [null]}',
        b'{"items": [], "more": 1}',
        b'{"items": [], "top_k": 0}',
        b'{"items": [], "top_k": 101}',
        b'{"items": [], "top_k": 1.5}',
        b'{"items": [], "top_k": NaN}',
        b'{"items": [], "top_k": true}',
        b'{"items": [], "top_k": "3"}',
        b'{"items": [], "filter_seen": 1}',
        b'{"items": [], "filter_seen": null}',
        json.dumps({'items': ['a'] * 1001}).encode(),
    ],
)
def test_a_body_that_is_none(server, body):
    status, headers, text = ask(server, '/explain', 'POST', body)
    assert status == 400
    assert headers['Content-Type'] == 'text/plain; charset=utf-8'
    assert text.count(b'\n') == 1 and len(text) < 100


def test_strange_ids_are_unknown_ids(server):
    strange = ['', '\ud800', '\0', '__class__', '<script>', '9' * 999]
    told = ask_json(server, '/explain', {'items': strange})
    assert told['unknown'] == strange


def test_the_longest_history(server):
    told = ask_json(server, '/explain', {'items': ['a', 'b'] * 500})
    assert (len(told['history']), told['too_old']) == (5, 995)


@pytest.mark.parametrize(
    ('length', 'status'),
    [
        (None, 411),
        ('-1', 400),
        ('+1', 400),
        ('x', 400),
        ('1_0', 400),
        ('\u00b2', 400),
        ('2\r\nContent-Length: 3', 400),
        ('65537', 413),
        ('9' * 5000, 413),
    ],
)
def test_lengths_of_a_body(server, length, status):
    line = '' if length is None else f'Content-Length: {length}\r\n'
    head = f'POST /explain HTTP/1.1\r\nHost: localhost\r\n{line}\r\n'.encode('latin-1')
    assert ask_raw(server, head + b'{}').startswith(f'HTTP/1.0 {status}'.encode())


def test_a_body_too_large_is_told_so_though_it_was_sent(server):
    with socket.create_connection(server.server_address, timeout=20) as client:
        client.sendall(
            b'POST /explain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n'
        )
        for _ in range(3):
            time.sleep(0.05)  # the answer is on its way, and the client speaks on
            client.sendall(b' ' * 33_333)
        assert client.recv(100).startswith(b'HTTP/1.0 413')


def test_a_body_in_chunks(server):
    sent = (
        b'POST /explain HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n'
    )
    assert ask_raw(server, sent).startswith(b'HTTP/1.0 411')


def test_a_body_that_ends_early(server):
    sent = b'POST /explain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"items": []}'
    assert ask_raw(server, sent, half=True).startswith(b'HTTP/1.0 400')


def test_a_long_address(server):
    assert ask(server, '/items?q=' + 'a' * 1900)[0] == 200
    assert ask(server, '/items?q=' + 'a' * 2100)[0] == 414
    assert b' 414 ' in ask_raw(server, b'GET /' + b'a' * 200_000 + b' HTTP/1.1\r\n\r\n')[:20]


@pytest.mark.parametrize(
    'headers', [b'X: ' + b'a' * 20_000, b'X: a\r\n' * 4000, b'X: a\r\n' * 150, b'X: ' + b'a' * 9**6]
)
def test_long_headers(server, headers):
    sent = b'GET / HTTP/1.1\r\nHost: localhost\r\n' + headers + b'\r\n\r\n'
    assert ask_raw(server, sent).startswith(b'HTTP/1.0 431')


def test_junk_is_survived(server):
    numbers = random.Random(0)
    for size in (1, 10, 100, 1000, 10_000):
        ask_raw(server, numbers.randbytes(size), half=True)
    for sent in (
        b'\r\n\r\n',
        b'GET / HTTP/2.0\r\n\r\n',
        b'GET / HTTP/x\r\n\r\n',
        b'GET /\r\n\r\n',
        b'GET\r\n\r\n',
        b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03',
        b'GET / HTTP/1.1\r\nHost localhost\r\n\r\n',
        b'GET / HTTP/1.1\r\n\r\n',
        b'GET / HTTP/1.1\r\nHost: a\r\nHost: localhost\r\n\r\n',
    ):
        assert b'<!doctype' not in ask_raw(server, sent, half=True), sent
    assert ask(server)[0] == 200


@pytest.mark.parametrize(
    ('host', 'status'),
    [
        ('localhost', 200),
        ('LOCALHOST:9', 200),
        ('127.0.0.1:8000', 200),
        ('[::1]:8000', 200),
        ('evil.example', 403),
        ('evil.example:8000', 403),
        ('localhost.evil.example', 403),
        ('127.0.0.1.evil.example', 403),
        ('evil.example@localhost', 403),
        ('localhost:x', 403),
        ('', 400),
    ],
)
def test_only_its_own_name(server, host, status):
    assert ask(server, Host=host)[0] == status


def test_another_page_may_not_ask(server):
    own = f'127.0.0.1:{server.server_address[1]}'
    assert ask(server, '/card', Host=own, Origin=f'http://{own}')[0] == 200
    assert ask(server, '/card', Host=own, Origin='http://evil.example')[0] == 403
    assert ask(server, '/card', Host=own, Origin='http://127.0.0.1:1')[0] == 403
    assert ask(server, '/card', Host=own, Origin='null')[0] == 403


def test_open_to_others_it_has_any_name(recommender):
    with serving(recommender, '0.0.0.0') as server:
        assert not server.is_loopback
        assert ask(server, Host='my-machine.lan:8000')[0] == 200


# Many at once


def test_fifty_clients_at_once(server, recommender):
    histories = [[IDS[1 + i % 8], IDS[1 + i // 8 % 8]] for i in range(50)]
    expected = [json.loads(json.dumps(explain(recommender, items))) for items in histories]
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        told = pool.map(lambda items: ask_json(server, '/explain', {'items': items}), histories)
        assert list(told) == expected


def test_who_says_nothing_keeps_nobody_waiting(server, monkeypatch):
    assert demo.Handler.timeout == demo.PATIENCE
    monkeypatch.setattr(demo.Handler, 'timeout', 0.5)
    slow = [socket.create_connection(server.server_address[:2], timeout=20) for _ in range(60)]
    for number, client in enumerate(slow):
        client.sendall(
            b'GET / HT'
            if number % 2
            else b'POST /explain HTTP/1.1\r\nHost: localhost\r\n'
            b'Content-Length: 100\r\n\r\n{"items": ['
        )
    began = time.monotonic()
    assert ask(server)[0] == 200
    assert time.monotonic() - began < 0.5
    for client in slow:
        assert client.recv(100) == b''  # the server's patience has an end
        client.close()


def test_a_fault_of_the_program_is_told_where_it_was_started(server, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    monkeypatch.setattr(server.demo, 'explain', lambda items: 1 / 0)
    status, _, text = ask(server, '/explain', 'POST', '{"items": []}')
    assert status == 500 and b'ZeroDivision' not in text
    until = time.monotonic() + 10
    while 'ZeroDivisionError' not in sys.stderr.getvalue() and time.monotonic() < until:
        time.sleep(0.01)
    assert 'ZeroDivisionError' in sys.stderr.getvalue()


def test_the_warm_up_compiles_what_the_page_asks(recommender):
    one = demo.Demo(recommender)
    asked = []
    one.explain = asked.append
    one.warm_up()
    assert [len(items) for items in asked] == [1, 2, 3, 4, 5]


# The command


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / 'SHA256SUMS').write_text('0  card.json\n')
    for argv, expected in (
        ([], '--export'),
        (['--export=x', '--port=x'], '--port'),
        (['--export=x', '--port=65536'], '--port=65536'),
        (['--export=x', '--port=-1'], '--port=-1'),
        (['--export=x', '--what'], '--what'),
        (['--export=x', '--port=0', '--host=256.1.1.1'], '256.1.1.1'),
        (['--export=x', '--port=0', '--host=a..b'], 'choose others'),
        (['--export=x', '--port=0', '--host='], '--host'),
        ([f'--export={tmp_path}/none', '--port=0'], 'none is no export'),
        ([f'--export={tmp_path}', '--port=0'], 'card.json is missing'),
    ):
        assert demo.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith('error: ') and err.count('\n') == 1 and expected in err, err


def test_a_port_in_use(server, capsys):
    port = server.server_address[1]
    assert demo.main(['--export=x', f'--port={port}']) == 2
    err = capsys.readouterr().err
    assert err.startswith(f'error: listening at 127.0.0.1, port {port}: ') and '--port' in err


def test_told_to_listen_to_others_it_warns(recommender, monkeypatch, capsys):
    monkeypatch.setattr(demo, 'load_export', lambda folder: recommender)
    monkeypatch.setattr(demo.Server, 'serve_forever', lambda self: None)
    assert demo.main(['--export=x', '--port=0']) == 0
    out, err = capsys.readouterr()
    assert out.startswith('demo: FAME (by hand), 8 items, http://127.0.0.1:')
    assert 'password' not in err
    assert demo.main(['--export=x', '--port=0', '--host=0.0.0.0']) == 0
    assert 'there is no password' in capsys.readouterr().err


WAITS = """
import sys
from fame_jax import demo
from tests.demo_test import a_recommender
demo.load_export = lambda folder: a_recommender()
sys.exit(demo.main(['--export=x', '--port=0']))
"""


def started():
    """The demo as a process of its own, when it is ready, and its address."""
    process = subprocess.Popen(
        [sys.executable, '-c', WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().split()[-1]


@pytest.mark.skipif(os.name != 'posix', reason='Ctrl-C is a signal')
def test_ctrl_c_ends_it_quietly():
    process, url = started()
    assert url.startswith('http://127.0.0.1:')
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert 'Traceback' not in out + err


BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason='no chromium')
def test_the_page_in_a_browser(server, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    options = ['--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={tmp_path}']
    address = f'{server.url}/#items=d,e,zzz'
    shown = subprocess.run(
        [browser, *options, '--virtual-time-budget=20000', '--dump-dom', address],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    shown = re.sub(' (title|aria-label)="[^"]*"', '', shown)
    history = shown[shown.index('<ol id="history"') : shown.index('id="answer"')]
    assert '<bdi dir="auto">&lt;script&gt;alert(1)&lt;/script&gt;&lt;b&gt;bold' in history
    assert '<bdi dir="auto">שלום עולם</bdi>' in history
    assert '<bdi dir="auto" class="id">zzz</bdi>' in history
    assert '<b>bold' not in shown
    recommended = shown[shown.index('<ol id="recommended"') : shown.index('<section id="why"')]
    assert recommended.count('<li>') == 6  # of 8, but for the two of the history
    assert shown.count('<h3>') == 3 and 'Head 2 · 50' in shown
