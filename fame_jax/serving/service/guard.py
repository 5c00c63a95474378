"""What every request passes and every answer gets: sender, token, headers, count and duration."""

import asyncio
import base64
import binascii
import hmac
import re
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fame_jax.serving.demo.server import HEADERS
from fame_jax.serving.service.errors import Refused
from fame_jax.serving.service.metrics import Metrics

# Answered without a token, so that a load balancer can ask.
OPEN_ROUTES = {'/health'}
ENCODED_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
JSON_POLICY = (b'content-security-policy', b"default-src 'none'")
CLOSE = (b'connection', b'close')


class Guard:
    """An ASGI application around the routes."""

    def __init__(
        self,
        app: ASGIApp,
        routes: set[str],
        metrics: Metrics,
        token: str,
        own_hosts: set[str] | None,
        is_stopping: Callable[[], bool],
    ):
        """Joins the routes with what surrounds them.

        Args:
          app: the routes.
          routes: their paths; others are counted as 'other'.
          metrics: counts the answers.
          token: which requests must carry; '' for none.
          own_hosts: the names in the Host header that are answered; None: all. A server without a
            token that listens to this machine alone answers only under its own names, since a web
            page elsewhere could give that page's name its address (DNS rebinding).
          is_stopping: whether connections are to be closed after their answer.
        """
        self._app, self._routes, self._metrics = app, routes, metrics
        self._token, self._own_hosts, self._is_stopping = token.encode(), own_hosts, is_stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        route = scope['path'] if scope['path'] in self._routes else 'other'
        status, began, has_answer = 500, time.perf_counter(), False

        async def send_more(message: Message) -> None:
            nonlocal status, has_answer
            has_answer = True
            if message['type'] == 'http.response.start':
                status = message['status']
                message['headers'] = self._headers(message, scope)
            await send(message)

        self._metrics.in_flight += 1
        try:
            try:
                self._check(Headers(scope=scope), route)
            except Refused as refused:
                await refuse(refused)(scope, receive, send_more)
            else:
                await self._app(scope, receive, send_more)
        except asyncio.CancelledError:  # a stop whose time is over
            if not has_answer:
                line = 'the server stopped before it had an answer'
                await refuse(Refused(503, 'stopping', line))(scope, receive, send_more)
        finally:
            self._metrics.in_flight -= 1
            self._metrics.count_request(route, status, time.perf_counter() - began)

    def _headers(self, message: MutableMapping[str, Any], scope: Scope) -> list:
        headers = [*message['headers'], *ENCODED_HEADERS]
        if not any(name == JSON_POLICY[0] for name, _ in headers):
            headers.append(JSON_POLICY)
        # After an error the rest of a body may still come: it is not read as the next request.
        has_rest = message['status'] >= 400 and scope['method'] not in ('GET', 'HEAD')
        if has_rest or self._is_stopping():
            headers.append(CLOSE)
        return headers

    def _check(self, headers: Headers, route: str) -> None:
        """Refuses requests of other web pages, under other names, and without the token."""
        hosts = headers.getlist('host')
        name = (
            re.fullmatch(r'(\[[0-9a-f:]+\]|[^:\s]+)(:\d{1,5})?', hosts[0].lower())
            if hosts
            else None
        )
        if len(hosts) != 1 or not name:
            raise Refused(400, 'bad_host', 'a request has one Host header')
        if self._own_hosts is not None and name[1] not in self._own_hosts:
            names = ' or '.join(sorted(self._own_hosts))
            raise Refused(
                403,
                'forbidden_host',
                f'this server has no token and answers as {names} alone; behind a proxy, set a '
                'token or pass on such a Host header',
            )
        for origin in headers.getlist('origin'):
            if origin.lower().partition('://')[2] != hosts[0].lower():
                raise Refused(403, 'forbidden_origin', 'requests of other web pages are refused')
        if self._token and route not in OPEN_ROUTES:
            given = headers.getlist('authorization')
            if len(given) != 1 or not is_token(given[0], self._token):
                line = 'this server needs the header "Authorization: Bearer TOKEN"'
                raise Refused(401, 'unauthorized', line)


def is_token(header: str, token: bytes) -> bool:
    """Whether an Authorization header carries the token, compared in constant time.

    `Bearer TOKEN`, or `Basic` with the token as the password of any user, for browsers.
    """
    scheme, _, given = header.partition(' ')
    value = given.strip().encode('latin-1', errors='replace')
    if scheme.lower() == 'basic':
        try:
            value = base64.b64decode(value, validate=True).partition(b':')[2]
        except binascii.Error:
            return False
    elif scheme.lower() != 'bearer':
        return False
    return hmac.compare_digest(value, token)


def refuse(refused: Refused) -> JSONResponse:
    """The answer to a request that is refused."""
    headers = {}
    if refused.status == 401:
        headers['WWW-Authenticate'] = 'Bearer realm="fame_jax", Basic realm="fame_jax"'
    if refused.status == 503:
        headers['Retry-After'] = '1'
    if 'allow' in refused.more:
        headers['Allow'] = refused.more['allow']
    return JSONResponse(refused.body, refused.status, headers)
