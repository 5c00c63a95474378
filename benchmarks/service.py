"""The HTTP server under load: requests a second and latency at 1, 16 and 128 clients.

    python -m benchmarks.service --out=FILE.json       FAME, random parameters, 12,000 items
    python -m benchmarks.service --export=FOLDER       an export of yours

Starts `fame_jax serve` as a process, and is itself the client: each of so many connections on
127.0.0.1 sends its next request when it has the answer to the last. Histories are as long as those
of Toys. Next to it, the same histories through Recommender in this process, one after another and
many at a time, while the server is idle. Client and server share the cores.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import timing
from benchmarks.serving import RECIPE, make_histories, make_recommender
from fame_jax import run_dir
from fame_jax.serving import export
from fame_jax.serving.recommender import Recommender

TOP_K = 20
START_SECONDS = 300  # at most, for loading and compiling


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[tuple[int, int]]:
    """Port and process id of a server of the folder, which is stopped at the end."""
    process = subprocess.Popen(
        [sys.executable, '-m', 'fame_jax.main', 'serve', f'--export={folder}', '--port=0'],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        if not line.startswith('ready: '):
            raise SystemExit(f'the server did not start: {line!r}')
        yield int(line.strip().rpartition(':')[2]), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def make_requests(histories: Sequence[Sequence[str]]) -> list[bytes]:
    """A POST /recommend for each history."""
    requests = []
    for history in histories:
        body = json.dumps({'history': history, 'k': TOP_K}).encode()
        head = (
            'POST /recommend HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n'
            f'Content-Length: {len(body)}\r\n\r\n'
        )
        requests.append(head.encode() + body)
    return requests


class Client(asyncio.Protocol):
    """A connection that sends its next request when it has the answer to the last."""

    def __init__(self, requests: Sequence[bytes], first: int, until: float):
        self.requests, self.next, self.until = requests, first, until
        self.seconds: list[float] = []
        self.failed = 0
        self.ended = asyncio.get_running_loop().create_future()
        self.buffer = b''

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.send()

    def send(self) -> None:
        self.began = time.perf_counter()
        self.transport.write(self.requests[self.next % len(self.requests)])
        self.next += 1

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, blank, body = self.buffer.partition(b'\r\n\r\n')
        if not blank:
            return
        length = head.lower().partition(b'content-length: ')[2].partition(b'\r\n')[0]
        if len(body) < int(length):
            return
        now = time.perf_counter()
        self.seconds.append(now - self.began)
        self.failed += not head.startswith(b'HTTP/1.1 200')
        self.buffer = b''
        if now < self.until:
            self.send()
        else:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)


async def load(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> list[Client]:
    """All clients, at work for so many seconds."""
    loop = asyncio.get_running_loop()
    until = time.perf_counter() + seconds
    made = [Client(requests, 7919 * i, until) for i in range(clients)]
    for client in made:
        await loop.create_connection(lambda client=client: client, '127.0.0.1', port)
    await asyncio.wait_for(asyncio.gather(*(c.ended for c in made)), seconds + 30)
    return made


def cpu_seconds(pid: int) -> float:
    """Processor seconds of a process so far."""
    user, system = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf('SC_CLK_TCK')


def measure(
    port: int, pid: int, requests: Sequence[bytes], clients: int, seconds: float
) -> dict[str, float]:
    """Requests a second, latency in milliseconds, and processor milliseconds of a request."""
    asyncio.run(load(port, requests, clients, min(1.0, seconds)))  # connections, caches
    began, server, own = time.perf_counter(), cpu_seconds(pid), time.process_time()
    made = asyncio.run(load(port, requests, clients, seconds))
    passed = time.perf_counter() - began
    times = np.concatenate([client.seconds for client in made])
    p50, p99 = 1e3 * np.percentile(times, (50, 99))
    return {
        'clients': clients,
        'requests': len(times),
        'failed': sum(client.failed for client in made),
        'requests_per_second': len(times) / passed,
        'p50_ms': float(p50),
        'p99_ms': float(p99),
        'max_ms': 1e3 * float(times.max()),
        'server_cpu_ms': 1e3 * (cpu_seconds(pid) - server) / len(times),
        'client_cpu_ms': 1e3 * (time.process_time() - own) / len(times),
    }


def measure_recommender(
    recommender: Recommender, histories: Sequence[Sequence[str]], seconds: float
) -> dict[str, float]:
    """Histories a second without a server."""
    recommender.warm_up(TOP_K)
    rates = {}
    for name, call in (
        ('recommend', lambda i: recommender.recommend(histories[i % len(histories)], TOP_K)),
        ('recommend_many', lambda _: list(recommender.recommend_many(histories, TOP_K))),
    ):
        count, began = 0, time.perf_counter()
        while time.perf_counter() < began + seconds:
            call(count)
            count += 1
        rate = count / (time.perf_counter() - began)
        rates[name] = rate * (len(histories) if name == 'recommend_many' else 1)
    return rates


def markdown(result: Mapping[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        timing.headline(result['machine']),
        '',
        '| | a second | p50 ms | p99 ms | max ms | server CPU ms | client CPU ms | failed |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for row in result['server']:
        lines.append(
            f'| {row["clients"]} clients | {row["requests_per_second"]:,.0f} | '
            f'{row["p50_ms"]:.1f} | {row["p99_ms"]:.1f} | {row["max_ms"]:.1f} | '
            f'{row["server_cpu_ms"]:.2f} | {row["client_cpu_ms"]:.2f} | {row["failed"]} |'
        )
    for name, rate in result['recommender'].items():
        lines.append(f'| Recommender.{name} | {rate:,.0f} | | | | | | |')
    return '\n'.join(lines)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--export', type=Path, help='folder; its ids are those of the requests')
    parser.add_argument('--out', type=Path, help='write the figures to this .json')
    parser.add_argument('--items', type=int, default=12_000, help='size of the catalogue')
    parser.add_argument('--clients', default='1,16,128', help='numbers of connections')
    parser.add_argument('--seconds', type=float, default=5.0, help='of each measurement')
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Measures, prints and writes."""
    args = parse_arguments(argv)
    machine = timing.describe_machine()
    with tempfile.TemporaryDirectory() as folder:
        path = args.export or Path(folder) / 'export'
        if not args.export:
            export.save(make_recommender('fame', args.items), path)
        recommender = export.load(path)
        ids = recommender.item_ids
        histories = [
            [ids[int(item)] for item in history]
            for history in make_histories(1024, recommender.num_items)
        ]
        requests = make_requests(histories)
        with serving(path) as (port, pid):
            counts = map(int, args.clients.split(','))
            rows = [measure(port, pid, requests, count, args.seconds) for count in counts]
        plain = measure_recommender(recommender, histories, args.seconds)
    result = {
        'machine': machine,
        'recipe': RECIPE if not args.export else recommender.card,
        'items': recommender.num_items,
        'top_k': TOP_K,
        'server': rows,
        'recommender': plain,
    }
    print(markdown(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        run_dir.write_json(args.out, result)


if __name__ == '__main__':
    main(sys.argv[1:])
