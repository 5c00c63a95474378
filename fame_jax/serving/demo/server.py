"""A local web page on which a history is built by clicking, and its recommendations are explained.

    fame_jax_demo --export=FOLDER [--port=8000] [--host=127.0.0.1]

(or python -m fame_jax.serving.demo.server). The server answers five routes: GET / (the page),
GET /items?q=WORDS&limit=20, GET /similar_items?item=ID&limit=10, GET /card, and POST /explain with
{"items": [ids], "k": 10, "filter_seen": true}. After its start it reads no file.

There is no password. The server therefore listens to this machine alone by default, and refuses
requests that another web page or another host name sends to it.
"""

import argparse
import base64
import hashlib
import ipaddress
import json
import re
import socketserver
import sys
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs

from fame_jax.errors import ArgumentParser, UserError, explain_os_errors
from fame_jax.serving import answers
from fame_jax.serving.demo.search import Search
from fame_jax.serving.export import load
from fame_jax.serving.recommender import Recommender

# Limits of a request: bytes of its body, items of its history, and items of a list.
MAX_BODY = 64 * 1024
MAX_HISTORY = 1000
MAX_LIST = 100

ROUTES = {'/': 'GET', '/items': 'GET', '/similar_items': 'GET', '/card': 'GET', '/explain': 'POST'}
HEADERS = {
    'Cache-Control': 'no-store',
    'Cross-Origin-Resource-Policy': 'same-origin',
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
}


class Refused(Exception):
    """A request that is refused, with its HTTP status and one line that says why."""

    def __init__(self, status: HTTPStatus, line: str):
        super().__init__(line)
        self.status = status


class Demo:
    """The answers of the routes, from one recommender."""

    def __init__(self, recommender: Recommender):
        self.recommender = recommender.with_string_ids()
        self.search = Search(self.recommender)
        self.page = resources.files(__package__).joinpath('index.html').read_text('utf-8')

    def explain(
        self, items: list[str], k: int = 10, filter_seen: bool | None = None
    ) -> dict[str, Any]:
        """`Recommender.explain` for any thread; a request waits only for programs of its own."""
        return self.recommender.explain(items, k, filter_seen=filter_seen).to_dict()

    def similar(self, item: str, k: int) -> dict[str, Any]:
        """The item, and lists of similar ones: by all, and by each of FAME's heads.

        Returns:
          {item: {item, title}, lists: [{by, items: [{item, title, score}]}]}.

        Raises:
          Refused: if the item is not in the catalogue.
        """
        indices, unknown = self.recommender.to_indices([item])
        if unknown:
            raise Refused(HTTPStatus.NOT_FOUND, 'the item is not in the catalogue')
        lists = []
        for each in answers.similar(self.recommender, self.recommender.to_ids(indices), k):
            found = each.found
            columns = found.items, found.titles or [''] * len(found.items), found.scores
            entries = [dict(zip(('item', 'title', 'score'), row)) for row in zip(*columns)]
            lists.append({'by': each.by, 'items': entries})
        return {'item': {'item': each.item, 'title': each.title}, 'lists': lists}

    def warm_up(self) -> None:
        """Compiles the programs of all requests, before the first click."""
        self.recommender.warm_up(MAX_LIST, [1], explain=True)

    def card(self) -> dict[str, Any]:
        """The export's card, the number of items and the length of the longest row."""
        sizes = {
            'num_items': self.recommender.num_items,
            'max_length': self.recommender.model.max_length,
        }
        return self.recommender.card | sizes


def content_policy(page: str) -> str:
    """The Content-Security-Policy that allows a page its own script and style and nothing else."""

    def hashes(tag: str) -> str:
        texts = re.findall(rf'<{tag}>(.*?)</{tag}>', page, re.DOTALL)
        sums = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in texts]
        return ' '.join(f"'sha256-{digest.decode()}'" for digest in sums)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


class Server(ThreadingHTTPServer):
    """Listens from the start, so that a port in use is an error before the export is loaded.

    `demo` must be set before requests are answered.
    """

    daemon_threads = True
    # Connections that wait to be accepted; with the default of 5 a busy machine resets some.
    request_queue_size = 128
    allow_reuse_port = False
    demo: Demo

    def __init__(self, host: str, port: int):
        super().__init__((host, port), Handler)
        self.is_loopback = ipaddress.ip_address(self.server_address[0]).is_loopback
        self.url = f'http://{host}:{self.server_address[1]}'
        self.hosts = {'localhost', '127.0.0.1', host.lower()}

    def server_bind(self) -> None:
        # The base class would ask the network for this machine's name.
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that closes its connection is no error; others keep their traceback.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Answers one request; the connection is then closed.

    The base class limits lines and headers, and answers methods other than GET and POST with 501.
    """

    server: Server
    timeout = 10  # seconds of silence within a request, after which it is dropped

    def do_GET(self) -> None:
        """Answers a GET request."""
        self._answer()

    def do_POST(self) -> None:
        """Answers a POST request."""
        self._answer()

    def _answer(self) -> None:
        try:
            self._check_sender()
            kind, text = self._route()
        except Refused as refused:
            self._send(refused.status, 'text/plain', f'{refused}\n')
        except OSError:
            raise
        except Exception:
            line = 'an error in the program; its traceback is where the demo was started\n'
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, 'text/plain', line)
            raise
        else:
            self._send(HTTPStatus.OK, kind, text)

    def _check_sender(self) -> None:
        """Refuses requests under another host name (DNS rebinding) and those of other web pages."""
        hosts = self.headers.get_all('Host', [])
        name = re.fullmatch(r'([^:]+)(:\d{1,5})?', hosts[0].lower()) if hosts else None
        if len(hosts) != 1 or not name:
            raise Refused(HTTPStatus.BAD_REQUEST, 'a request has one Host header')
        if self.server.is_loopback and name[1] not in self.server.hosts:
            raise Refused(HTTPStatus.FORBIDDEN, f'this server answers as {self.server.url} only')
        for origin in self.headers.get_all('Origin', []):
            if origin.lower().partition('://')[2] != hosts[0].lower():
                raise Refused(HTTPStatus.FORBIDDEN, 'requests of other web pages are refused')

    def _route(self) -> tuple[str, str]:
        """Content type and text of the answer."""
        path, _, query = self.path.partition('?')
        if path not in ROUTES:
            raise Refused(HTTPStatus.NOT_FOUND, f'the routes are {", ".join(ROUTES)}')
        if self.command != ROUTES[path]:
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, f'{path} takes {ROUTES[path]}')
        demo = self.server.demo
        if path == '/':
            return 'text/html', demo.page
        if path == '/items':
            value = demo.search.find(*parse_query(query, 'q'))
        elif path == '/similar_items':
            value = demo.similar(*parse_query(query, 'item'))
        elif path == '/card':
            value = demo.card()
        else:
            value = demo.explain(**parse_explain(self._read_body()))
        return 'application/json', json.dumps(value, allow_nan=False)

    def _read_body(self) -> bytes:
        length = self.headers.get('Content-Length')
        if length is None:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, 'a body needs a Content-Length')
        if not re.fullmatch('[0-9]{1,9}', length):
            raise Refused(HTTPStatus.BAD_REQUEST, 'Content-Length is a number')
        if int(length) > MAX_BODY:
            line = f'a body has at most {MAX_BODY:,} bytes'
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, line)
        return self.rfile.read(int(length))

    def _send(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header('Content-Type', f'{kind}; charset=utf-8')
        self.send_header('Content-Length', str(len(body)))
        policy = content_policy(text) if kind == 'text/html' else "default-src 'none'"
        for name, value in {**HEADERS, 'Content-Security-Policy': policy}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers what the base class refuses, with the same headers as every answer."""
        self._send(code, 'text/plain', f'{HTTPStatus(code).phrase}\n')

    def version_string(self) -> str:
        """The Server header."""
        return 'fame_jax'

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def parse_query(query: str, name: str) -> tuple[str, int]:
    """A text and the limit of a query: ...?NAME=...&limit=..."""
    try:
        fields = parse_qs(query, max_num_fields=10, errors='replace')
    except ValueError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, 'too many fields') from error
    limit = fields.get('limit', ['20'])[-1]
    if not re.fullmatch('[0-9]{1,3}', limit) or not 1 <= int(limit) <= MAX_LIST:
        raise Refused(HTTPStatus.BAD_REQUEST, f'limit is a number from 1 to {MAX_LIST}')
    return fields.get(name, [''])[-1], int(limit)


def parse_explain(body: bytes) -> dict[str, Any]:
    """The arguments of `Demo.explain`, checked for types and limits."""
    try:
        value = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise Refused(HTTPStatus.BAD_REQUEST, 'the body is not JSON') from error
    names = {'items', 'k', 'filter_seen'}
    if not isinstance(value, dict) or not {'items'} <= set(value) <= names:
        raise Refused(HTTPStatus.BAD_REQUEST, 'the body is {"items", "k", "filter_seen"}')
    items, k = value['items'], value.get('k', 10)
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise Refused(HTTPStatus.BAD_REQUEST, 'items is a list of ids, each a string')
    if len(items) > MAX_HISTORY:
        raise Refused(HTTPStatus.BAD_REQUEST, f'a history has at most {MAX_HISTORY:,} items')
    if type(k) is not int or not 1 <= k <= MAX_LIST:
        raise Refused(HTTPStatus.BAD_REQUEST, f'k is a number from 1 to {MAX_LIST}')
    if not isinstance(value.get('filter_seen', True), bool):
        raise Refused(HTTPStatus.BAD_REQUEST, 'filter_seen is true or false')
    return value


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags export, host and port.

    Raises:
      UserError: for an unknown flag or an impossible value.
    """
    parser = ArgumentParser('fame_jax_demo', description=__doc__.split('\n')[0])
    parser.add_argument('--export', required=True, help='exported folder (--stages=export)')
    parser.add_argument('--port', type=int, default=8000, help='port; 0: any free one')
    parser.add_argument('--host', default='127.0.0.1', help='IPv4 address to listen at')
    flags = parser.parse_args(argv)
    if not 0 <= flags.port < 2**16:
        raise UserError(f'--port={flags.port} is not a port; choose one from 1024 to 65535')
    return flags


def listen(host: str, port: int) -> Server:
    """A server that listens; it answers once it has a demo and `serve_forever` is called.

    Raises:
      UserError: if the port is in use or the host is not this machine's.
    """
    doing, advice = f'listening at {host}, port {port}', 'choose others with --host and --port'
    try:
        with explain_os_errors(doing, advice):
            return Server(host, port)
    except ValueError as error:
        raise UserError(f'{doing}: not an address; {advice}') from error


def run(argv: Sequence[str]) -> None:
    """Loads an export and serves it until it is stopped."""
    flags = parse_flags(argv)
    with listen(flags.host, flags.port) as server:
        server.demo = Demo(load(flags.export))
        if not server.is_loopback:
            print(
                f'warning: whoever reaches {server.url} can use the demo; there is no password',
                file=sys.stderr,
            )
        print('demo: compiling, so that no click waits for it ...', file=sys.stderr)
        began = time.monotonic()
        server.demo.warm_up()
        print(f'demo: compiled in {time.monotonic() - began:.0f} s', file=sys.stderr)
        recommender = server.demo.recommender
        name = recommender.card.get('model', 'a model')
        print(f'demo: {name}, {recommender.num_items:,} items, {server.url}', flush=True)
        server.serve_forever()


def main(argv: Sequence[str]) -> int:
    """Serves, and returns the exit code.

    Args:
      argv: the arguments, without the name of the program.
    """
    try:
        run(argv)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def cli() -> None:
    """The console script fame_jax_demo."""
    sys.exit(main(sys.argv[1:]))


if __name__ == '__main__':
    cli()
