"""The server under many, slow, silent and vanishing clients."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.client import HTTPResponse

import pytest
from fixtures import ROOT
from service_fixtures import IDS, make_exact, serving

from fame_jax.serving import export

pytest.importorskip('starlette')
command = pytest.importorskip('fame_jax.serving.service.command')

PROTOCOLS = ['h11', 'httptools']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('service') / 'v1'
    make_exact().export(folder)
    return folder


def encode(body, path='/recommend'):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f'POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n'
        f'Content-Length: {len(body)}\r\n\r\n'
    )
    return head.encode() + body


async def read_answer(reader):
    """Status and JSON of an answer."""
    head = (await reader.readuntil(b'\r\n\r\n')).decode()
    length = int(head.lower().partition('content-length: ')[2].partition('\r\n')[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


def test_a_thousand_interleaved_clients_each_get_their_own_answer(folder):
    """Of different histories, lengths of list and filters, twice over each connection."""
    command.allow_many_connections()
    recommender = export.load(folder)
    bodies = []
    for n in range(1000):
        history = [IDS[1 + n % 60], IDS[1 + n // 60], *([IDS[1 + n % 7]] if n % 3 else [])]
        body = {'history': history, 'k': 1 + n % 20, 'filter_seen': n % 5 > 0}
        if n % 4 == 0:
            body['deny'] = [IDS[1 + (n + 3) % 60], IDS[1 + n % 11]]
        if n % 6 == 0:
            body['allow'] = IDS[1 + n % 9 : 50]
        bodies.append(body)
    bodies[777] = {'histories': [body['history'] for body in bodies[:200]], 'k': 3}

    async def client(port, n, start, answers):
        reader, writer = await asyncio.open_connection('127.0.0.1', port)
        await start.wait()
        for turn in range(2):
            message = encode(bodies[(n + 500 * turn) % 1000])
            for part in (message[:70], message[70:]) if n % 10 == 0 else (message,):
                writer.write(part)
                await asyncio.sleep(0)
            status, answer = await read_answer(reader)
            assert status == 200, answer
            answers[turn, (n + 500 * turn) % 1000] = answer['recommendations']
        writer.close()

    async def all_clients(port):
        answers, start = {}, asyncio.Event()
        clients = [asyncio.create_task(client(port, n, start, answers)) for n in range(1000)]
        await asyncio.sleep(0.5)
        start.set()
        await asyncio.wait_for(asyncio.gather(*clients), 60)
        return answers

    with serving(folder, seconds=60) as server:
        answers = asyncio.run(all_clients(server.port))
        largest = server.metric('batch_histories_bucket{le="32"}')
        assert server.metric('batch_histories_count') > largest  # full batches
        assert server.metric('batch_histories_sum') == 2 * (999 + 200)
    assert len(answers) == 2000
    for n, body in enumerate(bodies):
        histories = body.pop('histories', None) or [body.pop('history')]
        expected = [
            (one.items, one.scores) for one in recommender.recommend_many(histories, **body)
        ]
        for turn in range(2):
            found = [(one['items'], one['scores']) for one in answers[turn, n]]
            assert found == expected, n


def test_requests_that_wait_share_the_next_batch_fairly(folder):
    """A request of many histories does not delay those that come after it."""
    with serving(folder) as server:
        served = server.service.versions.current.recommender
        plain, batches = served.recommend_each, []
        entered, release = threading.Event(), threading.Event()

        def recommend_each(histories):
            entered.set()
            assert release.wait(20)
            batches.append([history.k for history in histories])
            return plain(histories)

        served.recommend_each = recommend_each
        threads = []
        for count, k in (1, 1), (200, 2), (1, 3), (1, 4):
            body = {'histories': [['i1']] * count, 'k': k}
            threads.append(threading.Thread(target=server.post, args=('/recommend', body)))
            threads[-1].start()
            assert entered.wait(20)  # the first one is with the device
            wait_for(lambda k=k: server.service.batcher.waiting == (0, 200, 201, 202)[k - 1])
        release.set()
        for thread in threads:
            thread.join()
    assert batches[0] == [1]
    assert len(batches[1]) == 64 and {3, 4} < set(batches[1])
    assert [len(batch) for batch in batches[2:]] == [64, 64, 8, 2]


def test_a_full_queue_and_a_slow_device(folder):
    with serving(folder, waiting=3, seconds=1.0) as server:
        served = server.service.versions.current.recommender
        plain, entered, release = served.recommend_each, threading.Event(), threading.Event()

        def recommend_each(histories):
            entered.set()
            return release.wait(20) and plain(histories)

        served.recommend_each = recommend_each
        statuses = []

        def ask(count):
            body = json.dumps({'histories': [['i1']] * count})
            statuses.append(server.send('/recommend', 'POST', body))

        threads = [threading.Thread(target=ask, args=(count,)) for count in (1, 2, 1)]
        for n, thread in enumerate(threads):
            thread.start()
            assert entered.wait(20)
            wait_for(lambda n=n: server.service.batcher.waiting == (0, 2, 3)[n])
        ask(1)
        status, headers, content = statuses.pop()
        assert (status, content['error']['code']) == (503, 'queue_full')
        assert headers['Retry-After'] == '1'
        for thread in threads:
            thread.join()
        assert [(s, c['error']['code']) for s, _, c in statuses] == [(504, 'timeout')] * 3
        release.set()
        wait_for(lambda: server.send('/recommend', 'POST', '{"history": []}')[0] == 200)
        # Nothing was computed for those whose time was over.
        assert server.metric('batch_histories_sum') == 2


def wait_for(condition):
    """Waits until a condition holds."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError('the condition did not come true')


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_silent_and_slow_clients_are_dropped_and_delay_no_other(folder, protocol, monkeypatch):
    if protocol == 'httptools':
        pytest.importorskip('httptools')
    else:
        monkeypatch.setattr(command.importlib.util, 'find_spec', lambda name: None)
    with serving(folder, seconds=0.5) as server:
        whole = encode({'history': ['i1']})
        starts = (b'', b'POST /recommend HT', whole[:-3])
        clients = [socket.create_connection(('127.0.0.1', server.port)) for _ in range(30)]
        for n, client in enumerate(clients):
            client.sendall(starts[n % 3])
        began = time.monotonic()
        answer = server.post('/recommend', {'history': ['i1'], 'k': 2})
        assert len(answer['recommendations'][0]['items']) == 2
        for n, client in enumerate(clients):
            client.settimeout(20)
            with client:
                received = client.makefile('rb').read() if n % 3 == 2 else drop_of(client)
            assert (b' 408 ' in received and b'slow_body' in received) == (n % 3 == 2)
        assert 0.3 < time.monotonic() - began < 15
        slow = socket.create_connection(('127.0.0.1', server.port))
        with slow:  # a connection that has had an answer, and is slow with its next request
            slow.sendall(whole)
            with HTTPResponse(slow) as first:
                first.begin()
                assert first.status == 200
                first.read()  # the whole answer: it may come in several segments
            slow.sendall(b'POST')
            slow.settimeout(20)
            assert drop_of(slow) == b''


def drop_of(client):
    """What a client receives until its connection is closed or reset."""
    received = b''
    try:
        while segment := client.recv(65536):
            received += segment
    except ConnectionResetError:
        pass
    return received


def test_a_client_that_reads_no_answer_is_dropped(folder):
    with serving(folder, seconds=0.5, histories=2000, body=10**6) as server:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(('127.0.0.1', server.port))
        with client:
            message = encode({'histories': [['i1']] * 300, 'k': 20})
            client.settimeout(0.2)
            try:
                for _ in range(300):
                    client.sendall(message)
            except OSError:
                pass
            wait_for(lambda: server.service.metrics.in_flight == 0)
            assert server.send('/health')[0] == 200


def test_clients_that_vanish_leave_the_others_alone(folder):
    with serving(folder) as server:
        served = server.service.versions.current.recommender
        plain = served.recommend_each
        served.recommend_each = lambda histories: time.sleep(0.02) or plain(histories)
        for n in range(40):
            client = socket.create_connection(('127.0.0.1', server.port))
            message = encode({'history': [IDS[1 + n]]})
            client.sendall(message if n % 2 else message[:-4])
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
            client.close()  # with a reset
        answer = server.post('/recommend', {'history': ['i9'], 'k': 2, 'filter_seen': False})
        assert (
            answer['recommendations'][0]['items']
            == make_exact().recommend(['i9'], 2, filter_seen=False).items
        )
        wait_for(lambda: server.service.metrics.in_flight == 0)
        assert server.metric('requests_total{route="/recommend",status="500"}') == 0


@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_junk_is_answered_with_a_structured_error(folder, protocol, monkeypatch):
    if protocol == 'httptools':
        pytest.importorskip('httptools')
    else:
        monkeypatch.setattr(command.importlib.util, 'find_spec', lambda name: None)
    with serving(folder) as server:
        for sent in (
            b'\x16\x03\x01\x02\x00\r\n\r\n',
            b'GET / HTTP/x\r\n\r\n',
            b'\r\n\r\njunk\r\n\r\n',
            encode({}).replace(b'Content-Length: 2', b'Content-Length: -2'),
        ):
            with socket.create_connection(('127.0.0.1', server.port), timeout=20) as client:
                client.sendall(sent)
                head, _, body = client.makefile('rb').read().partition(b'\r\n\r\n')
            assert head.startswith(b'HTTP/1.1 400 ') and json.loads(body)['error']['code']
        assert server.send('/health')[0] == 200


def test_a_body_without_a_length_is_read_up_to_its_limit(folder):
    def chunked(body):
        head = (
            b'POST /recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n'
            b'Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n'
        )
        parts = (body[i : i + 100] for i in range(0, len(body), 100))
        return head + b''.join(b'%x\r\n%b\r\n' % (len(p), p) for p in parts) + b'0\r\n\r\n'

    with serving(folder, body=1000) as server:
        for size, status in (10, b'200'), (2000, b'413'):
            body = json.dumps({'history': ['x' * size]}).encode()
            with socket.create_connection(('127.0.0.1', server.port), timeout=20) as client:
                client.sendall(chunked(body))
                assert client.makefile('rb').read().split()[1] == status


def test_connections_have_a_limit(folder, monkeypatch):
    monkeypatch.setattr(command, 'MAX_CONNECTIONS', 5)
    with serving(folder) as server:
        clients = [socket.create_connection(('127.0.0.1', server.port)) for _ in range(5)]
        wait_for(lambda: server.send('/health')[0] == 503)
        status, _, content = server.send('/health')
        assert (status, content['error']['code']) == (503, 'too_many_connections')
        clients.pop().close()
        wait_for(lambda: server.send('/health')[0] == 200)
        for client in clients:
            client.close()


def test_a_stop_answers_what_has_arrived(folder):
    """SIGTERM to the command itself, with requests in flight over many connections."""
    process = subprocess.Popen(
        [
            *(sys.executable, '-m', 'fame_jax.main', 'serve', f'--export={folder}', '--port=0'),
            *('--no-demo', '--max_k=20'),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert line.startswith('ready: http://127.0.0.1:'), line
        port = int(line.rpartition(':')[2])
        stopping = asyncio.run(stop_under_load(process, port))
        ended = time.monotonic() - stopping
        assert process.wait(timeout=20) == 0
        assert ended < 10  # and 5 s on a machine that does nothing else
        assert process.stderr.read().endswith('serve: stopped\n')
    finally:
        process.kill()
        process.communicate()


async def stop_under_load(process, port):
    """Clients that ask until their connection ends; no request is left without its answer."""
    answered, refused = [0], []
    began = 0.0

    async def client(n):
        reader, writer = await asyncio.open_connection('127.0.0.1', port)
        while True:
            writer.write(encode({'histories': [[IDS[1 + n % 60]]] * 20, 'k': 20}))
            head = (await reader.readuntil(b'\r\n\r\n')).decode().lower()
            length = int(head.partition('content-length: ')[2].partition('\r\n')[0])
            answer = json.loads(await reader.readexactly(length))
            assert len(answer['recommendations']) == 20, answer
            answered[0] += 1
            if 'connection: close' in head:
                writer.close()
                return

    clients = [asyncio.create_task(client(n)) for n in range(40)]
    while answered[0] < 60 and not any(client.done() for client in clients):
        await asyncio.sleep(0.01)
    idle_reader, _ = await asyncio.open_connection('127.0.0.1', port)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(asyncio.gather(*clients), 10)
    try:
        await asyncio.open_connection('127.0.0.1', port)
    except OSError as error:
        refused.append(error)
    assert refused and await asyncio.wait_for(idle_reader.read(), 10) == b''
    while process.poll() is None and time.monotonic() < began + 10:
        await asyncio.sleep(0.01)
    return began


def test_a_stop_waits_for_answers(folder):
    answers = []
    with serving(folder) as server:
        served = server.service.versions.current.recommender
        plain = served.recommend_each
        served.recommend_each = lambda histories: time.sleep(1) or plain(histories)
        body = '{"history": ["i1"]}'
        thread = threading.Thread(
            target=lambda: answers.append(server.send('/recommend', 'POST', body))
        )
        thread.start()
        wait_for(lambda: server.service.metrics.in_flight == 1)
    thread.join()
    status, headers, content = answers[0]
    assert status == 200 and content['recommendations'] and headers['Connection'] == 'close'


def test_a_stop_does_not_wait_for_an_answer_that_takes_too_long(folder, monkeypatch):
    monkeypatch.setattr(command, 'STOP_ANSWERS', 0.2)
    release, answers = threading.Event(), []
    with serving(folder) as server:
        server.service.versions.current.recommender.recommend_each = lambda _: release.wait(20)

        def send():
            answers.append(server.send('/recommend', 'POST', '{"history": ["i1"]}'))
            release.set()

        thread = threading.Thread(target=send)
        thread.start()
        wait_for(lambda: server.service.metrics.in_flight == 1)
    thread.join()
    status, headers, content = answers[0]
    assert (status, content['error']['code']) == (503, 'stopping')
    assert headers['Connection'] == 'close' and headers['Retry-After'] == '1'


def test_while_it_stops_health_says_so(folder):
    with serving(folder) as server:
        assert server.send('/health')[0] == 200
        server.service.is_stopping = True
        status, headers, content = server.send('/health')
        assert (status, content['status']) == (503, 'stopping')
        assert headers['Connection'] == 'close'


def test_the_benchmark_counts_answers_and_failures(folder):
    from benchmarks import service

    requests = service.make_requests([['i1', 'i2'], ['i3']])
    with serving(folder) as server:
        row = service.measure(server.port, os.getpid(), requests, clients=4, seconds=0.2)
        assert row['failed'] == 0 and row['requests'] > 4
        assert 0 < row['p50_ms'] <= row['p99_ms'] <= row['max_ms']
        answered = server.metric('requests_total{route="/recommend",status="200"}')
        assert answered >= row['requests']  # and those before the measurement
        junk = [request.replace(b'"k"', b'"K"') for request in requests]
        row = service.measure(server.port, os.getpid(), junk, clients=1, seconds=0.05)
        assert row['failed'] == row['requests'] > 0
