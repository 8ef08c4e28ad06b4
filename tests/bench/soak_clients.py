"""Clients as they come: most want an answer, some a stream; some leave in the middle, some ask for what is broken."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tests.bench.http_wire import END_OF_CHUNKS, KEY, chat_body, post

# How many of a hundred requests; the rest want a whole answer.
SHARES = {"stream": 20, "leaves": 6, "leaves at once": 2, "engine fails": 3, "engine closes": 2, "stream is cut": 2,
          "unknown model": 2, "no JSON": 1, "asks for models": 1}  # fmt: skip
FAULTS: dict[str, dict[str, object]] = {
    "engine fails": {"fault": "error"}, "engine closes": {"fault": "close"},
    "stream is cut": {"fault": "cut", "events": 6},
}  # fmt: skip
SECONDS = 30.0
# Answers that a kind of request must get; the others may also be told that the engine is away.
EXPECTED = {"whole": {200}, "stream": {200}, "unknown model": {404}, "no JSON": {400}, "asks for models": {200}}


@dataclass
class Soak:
    """What has been asked, and how it was answered: (kind, status) -> how often. 0: the connection broke."""

    port: int
    requests: int
    until: float
    seed: int
    begun: int = 0
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)

    async def run(self, clients: int) -> None:
        await asyncio.gather(*(self._client(random.Random(self.seed * 1000 + number)) for number in range(clients)))

    @property
    def unexpected(self) -> int:
        """Answers that nothing explains; 503 is what a gateway may say of an engine that broke too often."""
        return sum(count for (kind, status), count in self.answers.items()
                   if kind in EXPECTED and status not in EXPECTED[kind] | {503})  # fmt: skip

    async def _client(self, chance: random.Random) -> None:
        line: Line | None = None
        while self.begun < self.requests and time.monotonic() < self.until:
            self.begun += 1
            kind = chance.choices([*SHARES, "whole"], [*SHARES.values(), 100 - sum(SHARES.values())])[0]
            line = line or await Line.open(self.port)
            status = 0
            try:
                async with asyncio.timeout(SECONDS):
                    status = await self._ask(kind, line, chance)
            except (OSError, asyncio.IncompleteReadError):
                line.close()
            self.answers[kind, status] += 1
            line = None if line.closed else line
        if line:
            line.close()

    async def _ask(self, kind: str, line: Line, chance: random.Random) -> int:
        headers = {"authorization": f"Bearer {KEY}"}
        if kind == "asks for models":
            return await line.ask(f"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n\r\n".encode())
        if kind == "no JSON":
            return await line.ask(post(self.port, b'{"model": "tick', headers))
        if kind == "unknown model":
            return await line.ask(post(self.port, chat_body(model="nobody-knows-it"), headers))
        if kind in ("leaves", "leaves at once"):
            body = chat_body(stream=True, canned={"events": 1000, "pause": 0.002})
            return await line.leave(post(self.port, body, headers), at_once=kind == "leaves at once")
        canned = {"events": chance.randint(4, 64)} if kind == "stream" else FAULTS.get(kind, {})
        return await line.ask(
            post(self.port, chat_body(stream=kind in ("stream", "stream is cut"), canned=canned), headers)
        )


@dataclass
class Line:
    """One connection of a client."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    closed: bool = False

    @classmethod
    async def open(cls, port: int) -> Line:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def ask(self, request: bytes) -> int:
        """The status, when the whole answer was read."""
        self.writer.write(request)
        head = await self._head()
        length = next((line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), b"")
        if length:
            await self.reader.readexactly(int(length.partition(b":")[2]))
        else:
            await self.reader.readuntil(END_OF_CHUNKS)
        if b"connection: close" in head.lower():
            self.close()
        return int(head[9:12])

    async def leave(self, request: bytes, *, at_once: bool) -> int:
        """Go away without a word, in the middle of a stream or before it has begun."""
        self.writer.write(request)
        status = 200
        if not at_once:
            status = int((await self._head())[9:12])
            await self.reader.read(100)
        self.close(abort=True)
        return status

    def close(self, *, abort: bool = False) -> None:
        self.closed = True
        leave: Callable[[], None] = self.writer.transport.abort if abort else self.writer.close
        leave()

    def _head(self) -> Awaitable[bytes]:
        return self.reader.readuntil(b"\r\n\r\n")
