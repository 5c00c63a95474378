"""Connections that are silent, slow or too many; uvicorn limits these only between requests."""

import asyncio
import json
from typing import Any

from fame_jax.serving.service.errors import Refused


def timed(base: type[Any], seconds: float, max_connections: int) -> type[Any]:
    """A protocol of uvicorn that drops connections which make no progress.

    Args:
      base: uvicorn's H11Protocol or HttpToolsProtocol.
      seconds: for the head of a request to arrive, and for a client to take a part of an answer.
      max_connections: further connections are answered with 503 and closed.
    """

    class Timed(base):
        """The protocol of one connection."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                line = f'{max_connections:,} connections are open already; try again later'
                transport.write(raw_answer(Refused(503, 'too_many_connections', line)))
                transport.close()
            else:
                self._start_timer()

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            if self._timer is None and self._is_waiting():
                self._start_timer()
            super().data_received(data)
            if not self._is_waiting():
                self._stop_timer()

        def connection_lost(self, error: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(error)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._start_timer()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_timer()

        def send_400_response(self, msg: str) -> None:
            self.transport.write(raw_answer(Refused(400, 'not_http', msg)))
            self.transport.close()

        def _is_waiting(self) -> bool:
            """Whether no request is being read or answered."""
            return self.cycle is None or self.cycle.response_complete

        def _start_timer(self) -> None:
            self._stop_timer()
            # Not `close`, which would wait for the client to read what is left.
            self._timer = self.loop.call_later(seconds, self.transport.abort)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Timed


def raw_answer(refused: Refused) -> bytes:
    """A whole HTTP answer, where there is no application to send it."""
    body = json.dumps(refused.body).encode()
    phrase = {400: 'Bad Request', 503: 'Service Unavailable'}[refused.status]
    head = (
        f'HTTP/1.1 {refused.status} {phrase}\r\nContent-Type: application/json\r\n'
        f'Content-Length: {len(body)}\r\nConnection: close\r\n\r\n'
    )
    return head.encode() + body
