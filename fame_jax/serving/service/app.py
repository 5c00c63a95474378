"""The routes of the server and their answers, as an ASGI application."""

import asyncio
import functools
import json
import sys
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from fame_jax.serving.demo import server as demo
from fame_jax.serving.recommender import HistoryRequest, ItemId, Recommendation
from fame_jax.serving.service import bodies, openapi
from fame_jax.serving.service.batching import Batcher
from fame_jax.serving.service.bodies import Limits
from fame_jax.serving.service.errors import Refused, invalid
from fame_jax.serving.service.guard import Guard, refuse
from fame_jax.serving.service.metrics import Metrics
from fame_jax.serving.service.versions import Version, Versions

# Bodies of more bytes and answers of more items are read and written in another thread, so that no
# other answer waits for them.
LARGE_BODY, LARGE_ANSWER = 32 * 1024, 2000
# Threads for similar items, explanations and large bodies, and how many of these may wait.
SIDE_THREADS, SIDE_WAITING = 2, 64
# A body that is too long is read on up to this size before the refusal, since a client that still
# sends may not read the answer.
DISCARDED_BODY = 16 * 2**20

T = TypeVar('T')


class Service:
    """The application: `app` is what uvicorn serves.

    Fields:
      is_stopping: whether connections are closed after their answers, and /health says 503.
    """

    def __init__(
        self, versions: Versions, limits: Limits, token: str = '', own_hosts: set[str] | None = None
    ):
        """Joins the routes; see `guard.Guard` for token and own_hosts."""
        self.versions, self.limits = versions, limits
        self.metrics = Metrics()
        self.batcher = Batcher(limits.waiting, self.metrics.batches.add)
        self.is_stopping = False
        self._side = ThreadPoolExecutor(SIDE_THREADS, 'side')
        self._side_waiting = 0
        has_page = versions.current.demo is not None
        self._openapi = openapi.document(limits, bool(token), has_page)
        self._docs = openapi.page(self._openapi)
        routes = {
            '/recommend': ('POST', self.recommend),
            '/similar': ('POST', self.similar),
            '/health': ('GET', self.health),
            '/metadata': ('GET', self.metadata),
            '/metrics': ('GET', self.metrics_text),
            '/openapi.json': ('GET', self.openapi),
            '/docs': ('GET', self.docs),
        }
        if has_page:
            routes |= {
                '/': ('GET', self.page),
                '/items': ('GET', self.items),
                '/similar_items': ('GET', self.similar_items),
                '/card': ('GET', self.card),
                '/explain': ('POST', self.explain),
            }
        starlette = Starlette(
            routes=[Route(path, to, methods=[method]) for path, (method, to) in routes.items()],
            exception_handlers={
                Refused: lambda _, error: refuse(error),
                demo.Refused: lambda _, error: refuse(
                    Refused(int(error.status), 'invalid', str(error))
                ),
                HTTPException: functools.partial(_refuse_route, routes=routes),
                ClientDisconnect: lambda *_: Response(status_code=499),
                FloatingPointError: _refuse_not_finite,
                Exception: lambda *_: refuse(
                    Refused(500, 'internal', 'an error in the program; its log has the traceback')
                ),
            },
        )
        starlette.router.redirect_slashes = False
        self.app = Guard(
            starlette, set(routes), self.metrics, token, own_hosts, lambda: self.is_stopping
        )

    def close(self, seconds: float | None = None) -> bool:
        """Ends the threads; returns whether the device's has ended within so many seconds."""
        self._side.shutdown(wait=False, cancel_futures=True)
        return self.batcher.close(seconds)

    async def recommend(self, request: Request) -> Response:
        """POST /recommend."""
        version = self.versions.current

        def prepare(body: bytes) -> tuple[list[HistoryRequest], list[ItemId]]:
            return to_histories(version, bodies.read_recommend(body, self.limits))

        async def answer() -> Response:
            body = await self.read_body(request)
            if len(body) < LARGE_BODY:
                histories, unknown = prepare(body)
            else:
                histories, unknown = await self._aside(lambda: prepare(body))
            answers = await self.batcher.answer(version.recommender, histories)
            value: dict[str, Any] = {'version': version.name, 'digest': version.digest}
            if unknown:
                value['unknown_filters'] = unknown
            value['recommendations'] = [to_dict(one) for one in answers]
            if sum(len(one.items) for one in answers) < LARGE_ANSWER:
                return to_json(value)
            return await self._aside(lambda: to_json(value))

        return await self._in_time(request, answer())

    async def similar(self, request: Request) -> Response:
        """POST /similar."""
        version = self.versions.current
        recommender = version.recommender

        async def answer() -> Response:
            item, k, by = bodies.read_similar(await self.read_body(request), self.limits)
            if not len(recommender.to_indices([item])[0]):
                raise Refused(422, 'unknown_item', f'item: {item!r} is not in the catalogue')

            def find() -> Recommendation:
                try:
                    return recommender.similar_items(item, k, by='all' if by is None else by)
                except ValueError as error:  # of `by`: item and k were checked
                    raise invalid('by', str(error)) from error

            value = {'version': version.name, 'digest': version.digest}
            return to_json(value | {'recommendation': to_dict(await self._aside(find))})

        return await self._in_time(request, answer())

    async def health(self, _: Request) -> Response:
        """GET /health."""
        version, status = self.versions.current, 'stopping' if self.is_stopping else 'ok'
        value = {'status': status, 'version': version.name, 'digest': version.digest}
        return to_json(value, 503 if self.is_stopping else 200)

    async def metadata(self, _: Request) -> Response:
        """GET /metadata."""
        version = self.versions.current
        recommender = version.recommender
        return to_json(
            {
                'version': version.name,
                'digest': version.digest,
                'num_items': recommender.num_items,
                'max_length': recommender.model.max_length,
                'filter_seen': recommender.filter_seen,
                'limits': self.limits._asdict(),
                'card': recommender.card,
            }
        )

    async def metrics_text(self, _: Request) -> Response:
        """GET /metrics."""
        version, versions = self.versions.current, self.versions
        text = self.metrics.text(
            self.batcher.waiting,
            {'version': version.name, 'digest': version.digest},
            versions.loaded,
            versions.refused,
        )
        return Response(text, media_type='text/plain; version=0.0.4')

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json."""
        return to_json(self._openapi)

    async def docs(self, _: Request) -> Response:
        """GET /docs."""
        return to_page(self._docs)

    async def page(self, _: Request) -> Response:
        """GET /, the page of `fame_jax_demo`."""
        return to_page(self._demo().page)

    async def items(self, request: Request) -> Response:
        """GET /items, of the page."""
        arguments = demo.parse_query(request.scope['query_string'].decode('latin-1'), 'q')
        found = self._aside(lambda: self._demo().search.find(*arguments))
        return to_json(await self._in_time(request, found))

    async def similar_items(self, request: Request) -> Response:
        """GET /similar_items, of the page."""
        arguments = demo.parse_query(request.scope['query_string'].decode('latin-1'), 'item')
        found = self._aside(lambda: self._demo().similar(*arguments))
        return to_json(await self._in_time(request, found))

    async def card(self, _: Request) -> Response:
        """GET /card, of the page."""
        return to_json(self._demo().card())

    async def explain(self, request: Request) -> Response:
        """POST /explain, of the page."""
        shown = self._demo()

        async def answer() -> Response:
            arguments = demo.parse_explain(await self.read_body(request))
            limit = min(self.limits.k, demo.MAX_LIST)  # for which programs are compiled
            if arguments.get('k', 1) > limit:
                raise invalid('k', f'is a whole number from 1 to {limit}', limit=limit)
            return to_json(await self._aside(lambda: shown.explain(**arguments)))

        return await self._in_time(request, answer())

    async def read_body(self, request: Request) -> bytes:
        """The body of a request.

        Raises:
          Refused: 415 if it is not JSON, 413 if it is too long.
        """
        kind, _, charset = request.headers.get('content-type', '').lower().partition(';')
        charset = charset.strip().removeprefix('charset=').strip('"')
        if kind.strip() != 'application/json' or charset not in ('', 'utf-8'):
            raise Refused(415, 'not_json', 'send the header "Content-Type: application/json"')
        if request.headers.get('content-encoding', 'identity').lower() != 'identity':
            raise Refused(415, 'encoded', 'a body is not compressed')
        limit = self.limits.body
        too_long = Refused(
            413, 'too_large', f'a body has at most {limit:,} bytes', {'limit': limit}
        )
        if 'expect' in request.headers and int(request.headers.get('content-length', 0)) > limit:
            raise too_long  # the client waits before it sends the body
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size <= limit:
                chunks.append(chunk)
            elif size > limit + DISCARDED_BODY:
                break
        if size > limit:
            raise too_long
        request.scope['fame_jax.has_body'] = True
        return b''.join(chunks)

    def _demo(self) -> demo.Demo:
        shown = self.versions.current.demo
        assert shown is not None  # there are no such routes without the page
        return shown

    async def _aside(self, call: Callable[[], T]) -> T:
        """The value of a call that takes milliseconds, from another thread.

        Raises:
          Refused: 503 if too many calls wait.
        """
        if self._side_waiting >= SIDE_WAITING:
            line = f'{self._side_waiting} such requests wait already; send it again later'
            raise Refused(503, 'queue_full', line)
        self._side_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._side, call)
        finally:
            self._side_waiting -= 1

    async def _in_time(self, request: Request, answer: Awaitable[T]) -> T:
        """The answer to a request.

        Raises:
          Refused: 504 if it takes too long, 408 if the body of the request does.
        """
        seconds = self.limits.seconds
        try:
            async with asyncio.timeout(seconds):
                return await answer
        except TimeoutError as error:
            if request.method == 'POST' and 'fame_jax.has_body' not in request.scope:
                line = f'the body did not come within {seconds:g} s'
                raise Refused(408, 'slow_body', line) from error
            line = f'there was no answer within {seconds:g} s; send it again later'
            raise Refused(504, 'timeout', line) from error


def to_histories(
    version: Version, body: bodies.RecommendBody
) -> tuple[list[HistoryRequest], list[ItemId]]:
    """The histories as `recommend_each` takes them, and the unknown ids of allow and deny.

    Raises:
      Refused: 422 if no id of `allow` is known.
    """
    recommender = version.recommender
    allowed_V, unknown = version.all_V, []
    if body.allow is not None or body.deny:
        try:
            allowed_V, unknown = recommender.candidate_mask(body.allow, body.deny or ())
        except ValueError as error:
            raise Refused(422, 'unknown_item', str(error)) from error
    k = min(body.k, recommender.num_items)
    filter_seen = recommender.filter_seen if body.filter_seen is None else body.filter_seen
    return [
        HistoryRequest(*recommender.to_indices(history), k, filter_seen, allowed_V)
        for history in body.histories
    ], unknown


def to_dict(answer: Recommendation) -> dict[str, Any]:
    """A recommendation as JSON; without titles where none is known."""
    value = answer._asdict()
    if not answer.titles:
        del value['titles']
    return value


def to_json(value: Any, status: int = 200) -> Response:
    """An answer.

    Raises:
      FloatingPointError: if a number is not finite.
    """
    try:
        text = json.dumps(value, allow_nan=False, separators=(',', ':'))
    except ValueError as error:
        raise FloatingPointError(str(error)) from error
    return Response(text.encode(), status, media_type='application/json')


def to_page(page: str) -> Response:
    """An HTML page that may run its own script and style alone."""
    headers = {'Content-Security-Policy': demo.content_policy(page)}
    return Response(page, media_type='text/html', headers=headers)


def _refuse_route(_: Request, error: HTTPException, routes: Iterable[str]) -> Response:
    """The answer to other paths (404) and methods (405)."""
    if error.status_code == 405:
        allowed = (error.headers or {}).get('Allow', '')
        line = f'this route takes {allowed}'
        return refuse(Refused(405, 'method_not_allowed', line, {'allow': allowed}))
    return refuse(Refused(404, 'not_found', f'the routes are {", ".join(routes)}'))


def _refuse_not_finite(_: Request, error: FloatingPointError) -> Response:
    print(f'error: {error}', file=sys.stderr, flush=True)
    line = 'the model gave a score that is not finite for this request'
    return refuse(Refused(500, 'not_finite', line))
