"""A page on this machine where one builds a history and sees what is recommended, and why.

    python -m fame_jax.demo --export=FOLDER [--host=127.0.0.1] [--port=8000]

The server answers four routes and nothing else, and reads no file once it is up: GET / (the page),
GET /items?q=WORDS&limit=20, GET /card, and POST /explain with {"items": [ids], "top_k": 10,
"filter_seen": true}. It asks for no password, so that it listens to this machine alone unless
told otherwise, and refuses what another page or another name sends to it.
"""

import argparse
import base64
import hashlib
import io
import ipaddress
import json
import re
import socket
import socketserver
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any, NoReturn
from urllib.parse import parse_qs

from fame_jax.catalogue import Catalogue
from fame_jax.errors import UserError, explain_os_errors
from fame_jax.explain import explain
from fame_jax.letters import plain
from fame_jax.serve import Recommender, load_export

# What a request may be at the most, in bytes and in items.
MAX_LINE = 2048
MAX_HEAD = 16 * 1024
MAX_BODY = 64 * 1024
MAX_HISTORY = 1000
MAX_LIST = 100

# Seconds that a client may keep silent in the middle of a request.
PATIENCE = 10

ROUTES = {'/': 'GET', '/items': 'GET', '/card': 'GET', '/explain': 'POST'}
HEADERS = {
    'Cache-Control': 'no-store',
    'Cross-Origin-Resource-Policy': 'same-origin',
    'Referrer-Policy': 'no-referrer',
    'X-Content-Type-Options': 'nosniff',
}


class Refused(Exception):
    """A request that is not answered: its status, and one line that says why."""

    def __init__(self, status: HTTPStatus, line: str = ''):
        super().__init__(line or status.phrase)
        self.status = status


class Demo:
    """What the routes answer, from one recommender."""

    def __init__(self, recommender: Recommender):
        self.recommender = recommender
        self.catalogue = Catalogue(recommender)
        self.page = resources.files('fame_jax').joinpath('demo.html').read_text('utf-8')
        self.policy = content_policy(self.page)
        # One at a time: two that meet a new length would both compile it.
        self._lock = threading.Lock()

    def explain(self, items: list[str], top_k: int = 10, filter_seen: bool = True) -> dict:
        """As `explain.explain`, from any thread."""
        with self._lock:
            return explain(self.recommender, items, top_k, filter_seen=filter_seen)

    def warm_up(self) -> None:
        """Compiles what the page will ask for, histories of every length that changes a shape."""
        most = self.recommender.model.max_length
        steps = [1 << bit for bit in range(most.bit_length())]
        for length in sorted({*steps, *(step + 1 for step in steps), most}):
            self.explain((self.recommender.item_ids[1:] * length)[: min(length, most)])

    def card(self) -> dict[str, Any]:
        """The export's card and what the page has to know."""
        model = self.recommender.model
        return self.recommender.card | {
            'num_items': self.recommender.num_items,
            'max_length': model.max_length,
            'facets': model.look is not None,
        }


def content_policy(page: str) -> str:
    """The Content-Security-Policy under which a page's own script and style run, and no other."""

    def sources(tag: str) -> str:
        inline = re.findall(rf'<{tag}>(.*?)</{tag}>', page, re.DOTALL)
        sums = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in inline]
        return ' '.join(f"'sha256-{digest.decode()}'" for digest in sums)

    return (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


class Server(ThreadingHTTPServer):
    """Listens from the start, so that a port in use is told at once; answers when it has a demo."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_port = False
    demo: Demo

    def __init__(self, host: str, port: int):
        self.host = host
        self.address_family = socket.AF_INET6 if ':' in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.is_loopback = ipaddress.ip_address(self.server_address[0]).is_loopback

    @property
    def url(self) -> str:
        host = f'[{self.host}]' if ':' in self.host else self.host
        return f'http://{host}:{self.server_address[1]}'

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the network for the name of this machine.
        socketserver.TCPServer.server_bind(self)

    def shutdown_request(self, request: socket.socket) -> None:
        # With something unread left behind, the client would get a reset and not the answer.
        with suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.settimeout(1)
            for _ in range(64):
                if not request.recv(MAX_BODY):
                    break
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that went away is no fault of the program; anything else keeps its traceback.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request, then the connection is closed."""

    server: Server
    timeout = PATIENCE

    def __getattr__(self, name: str) -> Any:
        # The base class calls do_METHOD; every method comes to the same door.
        if name.startswith('do_'):
            return self._answer
        raise AttributeError(name)

    def parse_request(self) -> bool:
        """Reads the head, which the base class would take at a hundred times the size."""
        self.command = self.request_version = self.requestline = ''
        self.close_connection = True
        if len(self.raw_requestline) > MAX_LINE:
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            return False
        head, line = b'', None
        while line not in (b'\r\n', b'\n', b''):
            line = self.rfile.readline(MAX_HEAD)
            head += line
            if len(head) > MAX_HEAD:
                self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
                return False
        body, self.rfile = self.rfile, io.BytesIO(head)
        try:
            return super().parse_request()
        finally:
            self.rfile = body

    def _answer(self) -> None:
        try:
            self._check_sender()
            kind, text = self._route()
        except Refused as refused:
            self._send(refused.status, 'text/plain', f'{refused}\n')
        except OSError:
            raise
        except Exception:
            line = 'a fault of the program; where the demo was started it is told in full\n'
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, 'text/plain', line)
            raise
        else:
            self._send(HTTPStatus.OK, kind, text)

    def _check_sender(self) -> None:
        """Refuses other names for this machine (DNS rebinding), and other pages' requests."""
        hosts = self.headers.get_all('Host', [])
        name = re.fullmatch(r'\[?([^\[\]]+?)\]?(:\d{1,5})?', hosts[0].lower()) if hosts else None
        if len(hosts) != 1 or not name:
            raise Refused(HTTPStatus.BAD_REQUEST, 'a request names its host once')
        ours = {'localhost', '127.0.0.1', '::1', self.server.host.lower()}
        if self.server.is_loopback and name[1] not in ours:
            raise Refused(HTTPStatus.FORBIDDEN, f'this is {self.server.url}, under no other name')
        for origin in self.headers.get_all('Origin', []):
            if origin.lower().partition('://')[2] != hosts[0].lower():
                raise Refused(HTTPStatus.FORBIDDEN, 'only its own page may ask')

    def _route(self) -> tuple[str, str]:
        path, _, query = self.path.partition('?')
        if path not in ROUTES:
            raise Refused(HTTPStatus.NOT_FOUND, f'there is {", ".join(ROUTES)}')
        if self.command != ROUTES[path]:
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, f'{path} takes {ROUTES[path]}')
        demo = self.server.demo
        if path == '/':
            return 'text/html', demo.page
        if path == '/items':
            found = demo.catalogue.find(*read_search(query))
        elif path == '/card':
            found = demo.card()
        else:
            found = demo.explain(**read_asked(self._read_body()))
        return 'application/json', json.dumps(found, allow_nan=False)

    def _read_body(self) -> bytes:
        lengths = self.headers.get_all('Content-Length', [])
        if not lengths or 'Transfer-Encoding' in self.headers:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, 'a body comes with its Content-Length')
        if len(lengths) > 1 or not re.fullmatch('[0-9]+', lengths[0]):
            raise Refused(HTTPStatus.BAD_REQUEST, 'Content-Length is one number')
        if len(lengths[0]) > 9 or int(lengths[0]) > MAX_BODY:
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f'a body has {MAX_BODY:,} bytes at the most'
            )
        body = self.rfile.read(int(lengths[0]))
        if len(body) < int(lengths[0]):
            raise Refused(HTTPStatus.BAD_REQUEST, 'the body ended before its Content-Length')
        return body

    def _send(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header('Content-Type', f'{kind}; charset=utf-8')
        self.send_header('Content-Length', str(len(body)))
        policy = self.server.demo.policy if kind == 'text/html' else "default-src 'none'"
        for name, value in {**HEADERS, 'Content-Security-Policy': policy}.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header('Allow', ROUTES[self.path.partition('?')[0]])
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses by itself, in our own form."""
        self._send(code, 'text/plain', f'{HTTPStatus(code).phrase}\n')

    def version_string(self) -> str:
        """What the Server header says."""
        return 'fame_jax'

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a click is no news."""


def read_search(query: str) -> tuple[str, int]:
    """The words and the limit of /items?q=...&limit=..."""
    try:
        fields = parse_qs(query, max_num_fields=10, errors='replace')
    except ValueError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, 'too many fields') from error
    limit = fields.get('limit', ['20'])[-1]
    if not re.fullmatch('[0-9]{1,3}', limit) or not 1 <= int(limit) <= MAX_LIST:
        raise Refused(HTTPStatus.BAD_REQUEST, f'limit is a number from 1 to {MAX_LIST}')
    return fields.get('q', [''])[-1], int(limit)


def read_asked(body: bytes) -> dict[str, Any]:
    """What a body asks of `Demo.explain`, each value of its type and within its limits."""
    try:
        asked = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise Refused(HTTPStatus.BAD_REQUEST, 'the body is no JSON') from error
    if not isinstance(asked, dict) or not {'items'} <= set(asked) <= {
        'items',
        'top_k',
        'filter_seen',
    }:
        raise Refused(HTTPStatus.BAD_REQUEST, 'the body is {"items", "top_k", "filter_seen"}')
    items, top_k = asked['items'], asked.get('top_k', 10)
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise Refused(HTTPStatus.BAD_REQUEST, 'items is a list of ids, each a string')
    if len(items) > MAX_HISTORY:
        raise Refused(HTTPStatus.BAD_REQUEST, f'a history has {MAX_HISTORY:,} items at the most')
    if type(top_k) is not int or not 1 <= top_k <= MAX_LIST:
        raise Refused(HTTPStatus.BAD_REQUEST, f'top_k is a number from 1 to {MAX_LIST}')
    if not isinstance(asked.get('filter_seen', True), bool):
        raise Refused(HTTPStatus.BAD_REQUEST, 'filter_seen is true or false')
    return asked


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f'{message}; see python -m fame_jax.demo --help')


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags: export, host, port.

    Raises:
      UserError: for a flag that is not known or a value that cannot be.
    """
    parser = _Parser('python -m fame_jax.demo', description=__doc__.split('\n')[0])
    parser.add_argument('--export', required=True, help='folder of an export (--stages=export)')
    parser.add_argument('--host', default='127.0.0.1', help='address to listen at')
    parser.add_argument('--port', type=int, default=8000, help='port; 0: any free one')
    flags = parser.parse_args(argv)
    if not flags.host:
        raise UserError('--host is empty; leave it out for this machine alone')
    if not 0 <= flags.port < 2**16:
        raise UserError(f'--port={flags.port} is no port; choose one from 1024 to 65535')
    return flags


def listen(host: str, port: int) -> Server:
    """A server that listens and does not answer yet.

    Raises:
      UserError: when the port is taken or the host is not this machine's.
    """
    doing, advice = f'listening at {host}, port {port}', 'choose others with --host and --port'
    try:
        with explain_os_errors(doing, advice):
            return Server(host, port)
    except (UnicodeError, ValueError) as error:
        raise UserError(f'{doing}: no such address; {advice}') from error


def run(argv: Sequence[str]) -> None:
    """Loads an export and serves it until it is stopped."""
    flags = parse(argv)
    with listen(flags.host, flags.port) as server:
        server.demo = Demo(load_export(flags.export))
        if not server.is_loopback:
            line = f'warning: whoever reaches {server.url} can use the demo; there is no password'
            print(line, file=sys.stderr)
        print('demo: getting ready ...', file=sys.stderr)
        server.demo.warm_up()
        recommender = server.demo.recommender
        model = plain(recommender.card.get('model', 'a model'), 60)
        print(f'demo: {model}, {recommender.num_items:,} items, {server.url}', flush=True)
        server.serve_forever()


def main(argv: Sequence[str]) -> int:
    """Serves, and returns the exit code; argv leaves the program's name out."""
    try:
        run(argv)
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
