"""uvicorn's HTTP, with bounds on a request's first line and headers: it would take as many as anybody sends, and wait
for them for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_BYTES = 64 << 10
# From the connection, or the first byte of a later request, to the end of the headers. Slow lines need one or two.
MOST_SECONDS = 20.0
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedHead(asyncio.Protocol):
    """Given to uvicorn as `http`; everything but the counting is its own protocol's."""

    def __init__(self, *, head_seconds: float = MOST_SECONDS, **given: Any) -> None:
        self._inner = HttpToolsProtocol(**given)
        self._size, self._seconds = 0, head_seconds
        self._timer: asyncio.TimerHandle | None = None
        self.eof_received = self._inner.eof_received  # type: ignore[method-assign]
        self.pause_writing = self._inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = self._inner.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._inner.connection_made(transport)  # type: ignore[arg-type]
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)
        if not self._within_head():
            self._size = 0
            self._stop_waiting()
            return
        self._size += len(data)
        self._wait()
        if self._size > MOST_BYTES:
            self._end(TOO_LONG)

    def _within_head(self) -> bool:
        """Has a request begun (its scope is made) whose headers have not ended (it has no cycle yet)?"""
        scope, cycle = self._inner.scope, self._inner.cycle
        return scope is not None and (cycle is None or cycle.scope is not scope)

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self._inner.loop.call_later(self._seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        cycle = self._inner.cycle
        if cycle is not None and not cycle.response_complete:
            self._wait()  # an answer is under way; what was sent behind its request is not even read
        elif self._size == 0:
            self._inner.transport.close()  # opened and never used: nobody waits for an answer
        else:
            self._end(TOO_SLOW)

    def _end(self, answer: bytes) -> None:
        self._inner.transport.write(answer)
        self._inner.transport.close()
