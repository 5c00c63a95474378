"""The command `fame_jax serve`: an HTTP server of an export, or of the newest one of a folder.

    fame_jax serve --export=FOLDER [--port=8000] [--host=127.0.0.1] ...

SIGTERM and Ctrl-C stop it: it accepts no more connections, answers what has arrived, and ends
within 5 seconds with exit code 0.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fame_jax.errors import ArgumentParser, UserError, explain_os_errors
from fame_jax.serving.service.bodies import Limits

if TYPE_CHECKING:
    from fame_jax.serving.service.app import Service

TOKEN = 'FAME_JAX_TOKEN'
# Seconds of a stop: while open connections may still send, and at most for answers after that.
STOP_QUIET, STOP_ANSWERS = 0.5, 3
MAX_CONNECTIONS = 4096
# Connections that wait to be accepted.
BACKLOG = 2048
KEEP_ALIVE = 30  # seconds between two requests of a connection
FEWEST_CHARACTERS = 16  # of a token
# Seconds until a waiting thread gets the interpreter. Python's own, .005, are as long as a batch
# takes.
SWITCH_SECONDS = 0.001


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of `fame_jax serve`.

    Raises:
      UserError: for an unknown flag or an impossible value.
    """
    parser = ArgumentParser(
        'fame_jax serve', description=__doc__.split('\n')[0], allow_abbrev=False
    )
    add = parser.add_argument
    limits = Limits()
    add('--export', required=True, help='an export, or a folder of exports: the newest is served')
    add('--host', default='127.0.0.1', help='address to listen at (default: this machine alone)')
    add('--port', type=int, default=8000, help='port; 0: any free one (default: 8000)')
    add('--token_file', help=f'file with the token of requests; or the variable {TOKEN}')
    add(
        '--reload_seconds',
        type=float,
        default=2.0,
        help='seconds between two looks for a newer export; 0: none (default: 2)',
    )
    add(
        '--demo',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='serve the page of fame_jax_demo at / too',
    )
    for name, value, about in (
        ('max_k', limits.k, 'items of a list'),
        ('max_histories', limits.histories, 'histories of a request'),
        ('max_items', limits.items, 'items of a history'),
        ('max_body', limits.body, 'bytes of a body'),
        ('max_waiting', limits.waiting, 'histories that wait; further requests get 503'),
    ):
        add(f'--{name}', type=int, default=value, help=f'most {about} (default: {value})')
    add(
        '--timeout',
        type=float,
        default=limits.seconds,
        help=f'seconds for an answer, or 504 (default: {limits.seconds:g})',
    )
    flags = parser.parse_args(argv)
    if not 0 <= flags.port < 2**16:
        raise UserError(f'--port={flags.port} is not a port; choose one from 1024 to 65535')
    for name in ('max_k', 'max_histories', 'max_items', 'max_body', 'max_waiting'):
        if getattr(flags, name) < 1:
            raise UserError(f'--{name}={getattr(flags, name)}: a limit is at least 1')
    if not 0 < flags.timeout <= 3600:
        raise UserError(f'--timeout={flags.timeout:g}: choose seconds from 0 (without it) to 3600')
    if not 0 <= flags.reload_seconds <= 86400:
        raise UserError(
            f'--reload_seconds={flags.reload_seconds:g}: choose seconds from 0 to 86400'
        )
    return flags


def read_token(path: str | None) -> str:
    """The token, from a file or the environment; '' if there is none.

    Raises:
      UserError: if the file cannot be read, or the token is too short or has other characters than
        printable ASCII.
    """
    if path is not None:
        where = f'--token_file={path}'
        with explain_os_errors(f'reading {where}', 'name a readable file'):
            token = Path(path).read_bytes().decode('latin-1').strip()
    elif TOKEN in os.environ:
        where, token = f'the variable {TOKEN}', os.environ[TOKEN].strip()
    else:
        return ''
    # The token itself is in no message.
    if len(token) < FEWEST_CHARACTERS:
        raise UserError(
            f'{where} has a token of {len(token)} characters; use {FEWEST_CHARACTERS} or more'
        )
    if not all('!' <= letter <= '~' for letter in token):
        raise UserError(f'{where}: a token has letters, digits and signs of ASCII, without spaces')
    return token


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port in use is an error before the export is loaded.

    Raises:
      UserError: if the port is in use or the host is not this machine's.
    """
    doing, advice = f'listening at {host}, port {port}', 'choose others with --host and --port'
    with explain_os_errors(doing, advice):
        (*kind, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # With the protocol's number: asyncio sends small answers at once (TCP_NODELAY) only on such
        # sockets, and otherwise each answer of two writes waits 40 ms for the client's kernel.
        listener = socket.socket(*kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches the socket."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def make_server(service: 'Service', quiet_seconds: float = STOP_QUIET) -> Any:
    """A uvicorn.Server of the service; `run(sockets=[listener])` serves until it is stopped.

    To stop it from another thread, set `should_exit`.

    Args:
      service: the application.
      quiet_seconds: of a stop, while open connections may still send.
    """
    import uvicorn

    from fame_jax.serving.service import connections

    if importlib.util.find_spec('httptools'):
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Protocol
    else:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol

    class Server(uvicorn.Server):
        """Stops in two steps, so that no request which has arrived is lost."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for server in self.servers:
                server.close()
            # Connections stay open a little longer, and close after their next answer. Closing
            # them at once would lose requests that are on their way.
            service.is_stopping = True
            await asyncio.sleep(quiet_seconds)
            await super().shutdown(sockets)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # The base class would raise the signal again after the stop, and so lose the exit code.
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            numbers = (signal.SIGINT, signal.SIGTERM)
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    seconds = service.limits.seconds
    config = uvicorn.Config(
        service.app,
        http=connections.timed(Protocol, seconds, MAX_CONNECTIONS),
        ws='none',
        lifespan='off',
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        headers=[('Server', 'fame_jax')],
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=STOP_ANSWERS,
    )
    logging.getLogger('uvicorn.error').setLevel(logging.ERROR)  # requests are not logged
    return Server(config)


def run(argv: Sequence[str]) -> None:
    """Loads an export and serves it until it is stopped.

    Raises:
      UserError: for a wrong flag, token, address or folder, or without starlette and uvicorn.
    """
    flags = parse_flags(argv)
    token = read_token(flags.token_file)
    for package in ('starlette', 'uvicorn'):
        if not importlib.util.find_spec(package):
            raise UserError(f"{package} is not installed: pip install 'fame_jax[serve]'")
    with listen(flags.host, flags.port) as listener:
        # Imported here, so that a wrong flag and a port in use are reported before jax is there.
        from fame_jax.serving.service.app import Service
        from fame_jax.serving.service.versions import Versions

        allow_many_connections()
        sys.setswitchinterval(SWITCH_SECONDS)
        limits = Limits(
            flags.max_body,
            flags.max_histories,
            flags.max_items,
            flags.max_k,
            flags.max_waiting,
            flags.timeout,
        )
        own_hosts = None
        if is_loopback(listener) and not token:
            own_hosts = {'localhost', '127.0.0.1', '[::1]', flags.host.lower()}
        name = f'[{flags.host}]' if ':' in flags.host else flags.host
        url = f'http://{name}:{listener.getsockname()[1]}'
        if not token and not is_loopback(listener):
            say(f'warning: whoever reaches {url} can use it; set {TOKEN} or --token_file')
        versions = Versions(Path(flags.export), flags.max_k, flags.demo, say)
        service = Service(versions, limits, token, own_hosts)
        stopped = threading.Event()
        watcher = threading.Thread(
            target=versions.watch, args=(flags.reload_seconds, stopped), daemon=True
        )
        if flags.reload_seconds:
            watcher.start()
        server = make_server(service)
        print(f'ready: {url}', flush=True)
        server.run(sockets=[listener])
        stopped.set()
        has_ended = service.close(seconds=0.3)
        if watcher.is_alive():
            watcher.join(0.2)
        say('stopped')
        if watcher.is_alive() or not has_ended:
            # A stop waits neither for a version that compiles nor for clients that are gone.
            sys.stdout.flush()
            os._exit(0)


def say(line: str) -> None:
    """Prints a line on stderr."""
    print(f'serve: {line}'.encode(errors='backslashreplace').decode(), file=sys.stderr, flush=True)


def allow_many_connections() -> None:
    """Raises the soft limit of open files, of which each connection is one."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(argv: Sequence[str]) -> int:
    """Serves, and returns the exit code: 0 after a stop, 2 for a user's mistake.

    Args:
      argv: the arguments, without the name of the program.
    """
    try:
        run(argv)
    except UserError as error:
        print(f'error: {error}'.encode(errors='backslashreplace').decode(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the server has started
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
