"""One attempt against upstreams that send anything at all, byte by byte: an answer, or a clean error, and no more."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from serving import passing
from serving.engine import Engine
from serving.http_messages import ClientGone, Message, Refusal
from serving.passing import Attempt, Unanswered, pass_on
from serving.routes import Board, Route
from tests.fakes.told import Told

CHAT = "/v1/chat/completions"
WHOLE = json.dumps({"choices": [{"index": 0, "message": {"content": "hi"}}]}).encode()
EVENT, DONE = b'data: {"choices": [{"index": 0, "delta": {"content": "hi"}}]}\n\n', b"data: [DONE]\n\n"
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


def plain(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", "connection: close", *headers]
    size = len(body) if length is None else length
    kind = [] if any("content-type" in each for each in headers) else ["content-type: application/json"]
    return "\r\n".join([*lines, *kind, f"content-length: {size}", "", ""]).encode() + body


@dataclass
class Raw:
    """A server that answers with `parts`, one after another, and then closes; `stays`: it keeps the connection."""

    parts: list[bytes]
    stays: bool = False
    url: str = ""
    heads: list[bytes] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reading: asyncio.StreamReader, writing: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            self.heads.append(await reading.readuntil(b"\r\n\r\n"))
            for part in self.parts:
                writing.write(part)
                await writing.drain()
                await asyncio.sleep(0.01)
            if self.stays:
                await reading.read()
        writing.close()
        with contextlib.suppress(ConnectionError):
            await writing.wait_closed()
        self.ended.set()


@asynccontextmanager
async def raw(*parts: bytes, stays: bool = False) -> AsyncIterator[tuple[Raw, Callable[..., Awaitable[Any]]]]:
    """The server, and what asks it."""
    here = Raw(list(parts), stays)
    server = await asyncio.start_server(here.serve, "127.0.0.1", 0)
    here.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    board = Board()
    async with Engine(here.url, "engine-key") as engine:

        async def ask(send: Any, first: float = 5.0, whole: float = 5.0) -> Refusal | None:
            now = asyncio.get_running_loop().time()
            attempt = Attempt(
                Route("tickets@2", engine), CHAT, {"model": "x"}, [(b"x-ft-adapter", b"tickets@2")],
                now + first, now + whole, lambda: None,
            )  # fmt: skip
            try:
                return await pass_on(board, attempt, send)
            finally:
                assert not board.in_flight

        yield here, ask
    server.close()
    await asyncio.wait_for(here.ended.wait(), 5)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0\xff\xfe" * 50,
        b"HTTP/1.1 9999 What\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx-long: " + b"a" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: application/json\r\n\r\nzz\r\n{}\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n",
        plain(b"<html>busy at http://10.0.0.5</html>", "content-type: text/html"),
        plain(b'{"choices": ['),
        plain(b"[1, 2]"),
        plain(b"", status="204 No Content"),
        plain(b"", "location: http://elsewhere.example/v1", status="307 Temporary Redirect"),
        plain(b'{"error": {"message": "no such key"}}', status="401 Unauthorized"),
        plain(WHOLE, length=len(WHOLE) + 10),
        plain(b"not gzip at all", "content-encoding: gzip"),
        STREAM,
        STREAM + b"<html>hello</html>",
        STREAM + b'data: {"error": {"message": "engine dead at http://10.0.0.5"}}\n\n',
    ],
)
def test_what_is_no_answer_is_left_to_somebody_else(answer: bytes) -> None:
    async def run() -> None:
        async with raw(answer) as (here, ask):
            told = Told()
            with pytest.raises(Unanswered) as caught:
                await ask(told.send)
            refusal = caught.value.refusal
            assert (refusal.status, refusal.code, caught.value.again) == (503, "engine_away", True)
            assert here.url not in refusal.message
            assert "10.0.0.5" not in refusal.message
            assert "127.0.0.1" not in refusal.message
            assert not told.status

    asyncio.run(run())


def test_a_redirect_takes_nothing_elsewhere() -> None:
    async def run() -> None:
        async with raw(plain(WHOLE)) as (elsewhere, ask_elsewhere):
            leads = plain(b"", f"location: {elsewhere.url}{CHAT}", status="307 Temporary Redirect")
            async with raw(leads) as (_, ask):
                with pytest.raises(Unanswered):
                    await ask(Told().send)
            assert not elsewhere.heads
            await ask_elsewhere(Told().send)

    asyncio.run(run())


def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "LONGEST", 1 << 20)

    async def run() -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n{"
        for answer in ([head, *[b" " * 300_000] * 10], [plain(b"{", length=1 << 40), *[b" " * 300_000] * 10]):
            async with raw(*answer) as (_, ask):
                with pytest.raises(Unanswered):
                    await ask(Told().send)

    asyncio.run(run())


def test_a_compressed_answer_is_told_with_its_true_length() -> None:
    async def run() -> None:
        async with raw(plain(gzip.compress(WHOLE), "content-encoding: gzip", "x-secret: s")) as (_, ask):
            told = Told()
            assert await ask(told.send) is None
            assert (told.body, int(told.headers["content-length"])) == (WHOLE, len(WHOLE))
            assert set(told.headers) == {"content-type", "content-length", "x-ft-adapter"}

    asyncio.run(run())


@pytest.mark.parametrize("end", [[DONE], [DONE[:8], DONE[8:]], [DONE[:1], DONE[1:9], DONE[9:]], [EVENT + DONE]])
def test_a_streams_end_is_seen_however_it_is_cut(end: list[bytes]) -> None:
    async def run() -> None:
        async with raw(STREAM, b": wait\n\n", EVENT, *end) as (_, ask):
            told = Told()
            assert await ask(told.send) is None
            assert told.body == b": wait\n\n" + EVENT + b"".join(end)
            assert told.is_over

    asyncio.run(run())


@pytest.mark.parametrize("last", [EVENT, EVENT[:-9]])
def test_a_stream_that_ends_too_early_says_so_in_an_event_of_its_own(last: bytes) -> None:
    async def run() -> None:
        async with raw(STREAM, EVENT, last) as (_, ask):
            told = Told()
            broke = await ask(told.send)
            assert broke.code == "engine_broke"
            final = told.body.split(b"\n\n")[-2]
            assert json.loads(final.removeprefix(b"data: "))["error"]["code"] == "engine_broke"
            assert told.is_over

    asyncio.run(run())


def test_a_stream_that_stops_talking_ends_in_time() -> None:
    async def run() -> None:
        async with raw(STREAM + EVENT, stays=True) as (_, ask):
            told = Told()
            broke = await ask(told.send, whole=0.3)
            assert (broke.status, broke.code) == (504, "answer_timeout")
            assert told.is_over

    asyncio.run(run())


def test_a_caller_that_reads_no_more_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passing, "GOODBYE_SECONDS", 0.1)

    async def send(message: Message) -> None:
        if message["type"] != "http.response.start":
            await asyncio.sleep(30)

    async def run() -> None:
        async with raw(STREAM + EVENT, stays=True) as (_, ask), asyncio.timeout(3):
            with pytest.raises(ClientGone):
                await ask(send, whole=0.2)

    asyncio.run(run())


def test_nothing_of_the_caller_but_the_request_goes_there() -> None:
    async def run() -> None:
        async with raw(plain(WHOLE)) as (here, ask):
            await ask(Told().send)
            names = {line.split(b":")[0].lower() for line in here.heads[0].split(b"\r\n")[1:] if line}
            assert names == {b"host", b"authorization", b"accept", b"accept-encoding", b"content-type",
                             b"content-length", b"user-agent"}  # fmt: skip

    asyncio.run(run())


@pytest.mark.parametrize(("later", "expected"), [("12", 12), ("soon", 5), ("99999999", 5)])
def test_a_busy_engine_says_when_to_come_again(later: str, expected: int) -> None:
    async def run() -> None:
        busy = plain(b"{}", f"retry-after: {later}", status="429 Too Many Requests")
        async with raw(busy) as (_, ask):
            with pytest.raises(Unanswered) as caught:
                await ask(Told().send)
            refusal = caught.value.refusal
            assert (refusal.status, refusal.retry_after, caught.value.blame) == (429, expected, False)

    asyncio.run(run())
