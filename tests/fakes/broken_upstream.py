"""An upstream on loopback that answers each request with the bytes that it is told, then closes or says no more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass
class BrokenUpstream:
    """`answer` goes out as it is, then the parts of `then`, one by one; then the connection closes, unless it `hangs`.
    `asked` has the heads of the requests for answers."""

    answer: bytes = b""
    hangs: bool = False
    then: list[bytes] = field(default_factory=list)
    url: str = ""
    asked: list[bytes] = field(default_factory=list)

    async def serve(self, reading: asyncio.StreamReader, writing: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reading.readuntil(b"\r\n\r\n"):
                await reading.readexactly(_length(head))
                if head.startswith(b"GET /health "):
                    writing.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                    continue
                self.asked.append(head)
                writing.write(self.answer)
                await writing.drain()
                for part in self.then:
                    await asyncio.sleep(0.05)
                    writing.write(part)
                if self.hangs:
                    await reading.read()
                break
        writing.close()


@asynccontextmanager
async def broken_upstream(answer: bytes, *, hangs: bool = False) -> AsyncIterator[BrokenUpstream]:
    upstream = BrokenUpstream(answer, hangs)
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield upstream
    finally:
        server.close()


def _length(head: bytes) -> int:
    found = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return int(found[0]) if found else 0
