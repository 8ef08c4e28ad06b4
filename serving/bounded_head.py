"""uvicorn's HTTP, with a bound on a request's first line and headers: it would hold as many as anybody sends."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_BYTES = 64 << 10
ANSWER = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class BoundedHead(asyncio.Protocol):
    """Given to uvicorn as `http`; everything but the counting is its own protocol's."""

    def __init__(self, **given: Any) -> None:
        self._inner = HttpToolsProtocol(**given)
        self._size = 0
        self.connection_lost = self._inner.connection_lost  # type: ignore[method-assign]
        self.eof_received = self._inner.eof_received  # type: ignore[method-assign]
        self.pause_writing = self._inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = self._inner.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._inner.connection_made(transport)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)
        self._size = self._size + len(data) if self._within_head() else 0
        if self._size > MOST_BYTES:
            self._inner.transport.write(ANSWER)
            self._inner.transport.close()

    def _within_head(self) -> bool:
        """Has a request begun (its scope is made) whose headers have not ended (it has no cycle yet)?"""
        scope, cycle = self._inner.scope, self._inner.cycle
        return scope is not None and (cycle is None or cycle.scope is not scope)
