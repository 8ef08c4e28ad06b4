"""What a gateway must survive: requests and upstreams that are wrong, slow, huge or hostile, over real sockets.

After each of them the same process answers the next request, and nothing of the upstream was in what it said.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from registry.serve_recipe import Limits
from serving.callers import Callers
from serving.engine import Engine
from serving.http_messages import Refusal, read_body, send_json, send_refusal
from serving.listening import http_server
from serving.policy import Policy
from serving.routes import Route, Routes
from tests.fakes.broken_upstream import broken_upstream
from tests.serving.test_gateway import KEY, Front, error_of, front, in_front

ENGINE_KEY = "engine-key"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\n"
GOOD = {"model": "tickets", "messages": []}
SENT = json.dumps(GOOD).encode()
# Part of 100 MB that may have left this side when the answer comes: the limit, and what lies in buffers.
MOST_SENT = 32 << 20


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


async def still_answers(here: Front) -> None:
    here.board.put("engine", here.routes())
    status, headers, _ = await here.post(GOOD)
    assert (status, headers["x-ft-adapter"]) == (200, "tickets@2")
    assert not here.board.in_flight


async def talk(here: Front, *parts: bytes, pause: float = 0.0) -> Answer | None:
    """Send the parts as they are, and read until the gateway closes. None if it closed without a word."""
    reading, writing = await asyncio.open_connection("127.0.0.1", int(here.url.rpartition(":")[2]))
    answering = asyncio.create_task(all_of(reading))
    try:
        async with asyncio.timeout(15):
            for part in parts:
                if answering.done():
                    break
                writing.write(part)
                await asyncio.sleep(pause)
            said = await answering
    finally:
        writing.close()
    return read_answer(said) if said else None


async def all_of(reading: asyncio.StreamReader) -> bytes:
    """What came before the end, or before the connection was reset: the gateway closes on who still sends."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while part := await reading.read(65536):
            said += part
    return said


def read_answer(said: bytes) -> Answer:
    head, _, body = said.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    return Answer(int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body)


def sized(body: bytes, more: bytes = b"") -> bytes:
    return POST + more + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body


# --- what is no HTTP, or no JSON ---


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS to a plain port
        b"\x00" * 1000,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
        b"GET http://[::1/ HTTP/1.1\r\nhost: x\r\n\r\n",
        POST + b"content-length: -5\r\n\r\n",
        POST + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        POST + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        POST + b"x: a\r\n b\x00c\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(sent: bytes) -> None:
    async def test(here: Front) -> None:
        answer = await talk(here, sent)
        assert answer is None or answer.status == 400
        assert not here.canned.seen
        await still_answers(here)

    in_front(test)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tickets"',
        b'{"model": "tickets", "messages": [}',
        b'{"model": "tick\xff\xfeets"}',
        b'{"model": "tickets", "messages": "\xc3\x28"}',
        b"\xef\xbb\xbf" + b"\xff",
        b'{"model": "tickets", "seed": ' + b"9" * 10_000 + b"}",
        b"[" * 990 + b"]" * 990,
        b'{"model": ["tickets"]}',
        b'{"model": null}',
        b'"tickets"',
        b"",
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    async def test(here: Front) -> None:
        answer = await talk(here, sized(body))
        assert answer is not None
        assert answer.status == 400
        assert error_of(answer.body.decode())["code"] in ("invalid_json", "invalid_model")
        assert not here.canned.seen
        await still_answers(here)

    in_front(test)


def test_json_as_deep_as_it_can_be_read_is_never_a_server_error() -> None:
    async def test(here: Front) -> None:
        for depth in range(900, 1000, 9):
            nested = b"[" * depth + b"]" * depth
            status, _, _ = await here.post(b'{"model": "tickets", "made_up": ' + nested + b"}")
            assert status in (200, 400), depth
        await still_answers(here)

    in_front(test)


def test_odd_texts_are_passed_on_or_named_without_harm() -> None:
    async def test(here: Front) -> None:
        for name in ("tickets\r\nx-evil: 1", "\x00", "a" * 100_000, "tickets@1\n", "../tickets", "✓"):
            status, headers, text = await here.post({"model": name})
            assert (status, error_of(text)["code"]) == (404, "model_not_found")
            assert "x-evil" not in headers
            assert len(text) < 1000
        for odd in (b'"\\ud800"', b'"\\u0000"', b"NaN", b"1e999"):
            status, _, _ = await here.post(b'{"model": "tickets", "messages": [], "made_up": ' + odd + b"}")
            assert status in (200, 400)
        status, _, text = await here.post({"model": "\ud800"})
        assert (status, error_of(text)["code"]) == (400, "invalid_json")
        await still_answers(here)

    in_front(test)


# --- headers ---


@pytest.mark.parametrize(
    "given",
    [b"abc\rx-evil: 1", b"abc\r\n x-evil: 1", b"a b", b"", b"a" * 65, b"\xff\xfe", b"<script>", b"abc;x"],
)
def test_a_request_id_cannot_carry_anything_into_the_answer(given: bytes) -> None:
    async def test(here: Front) -> None:
        answer = await talk(here, sized(SENT, b"x-request-id: " + given + b"\r\n"))
        assert answer is not None
        assert answer.status in (200, 400)
        assert "x-evil" not in answer.headers
        if answer.status == 200:
            assert len(answer.headers["x-request-id"]) == 32
        await still_answers(here)

    in_front(test)


def test_nothing_of_a_callers_headers_reaches_the_engine() -> None:
    async def test(here: Front) -> None:
        mine = {"X-Forwarded-Host": "evil", "X-Upstream-Url": "http://127.0.0.1:9", "Cookie": "a=b", "Host": "evil"}
        status, _, _ = await here.post(GOOD, Authorization=f"Bearer {KEY}x", **mine)
        assert status == 200
        seen, _ = here.canned.seen[0]
        assert not {"X-Forwarded-Host", "X-Upstream-Url", "Cookie"} & seen.keys()
        assert seen["Host"] != "evil"

    in_front(test)


def test_an_odd_path_is_not_found() -> None:
    async def test(here: Front) -> None:
        for path in (b"/v1/models%0d%0ax-evil:%201", b"/v1/../health", b"//v1/models", b"/%00", b"/" + b"a" * 20_000):
            answer = await talk(here, b"GET " + path + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert answer is not None
            assert answer.status in (400, 404)
            assert "x-evil" not in answer.headers
            assert len(answer.body) < 1000
        await still_answers(here)

    in_front(test)


# --- keys and limits ---


@pytest.mark.parametrize("given", ["", "wrong", "ft-" + "a" * 43, "a" * 5000, KEY + " ", "\xff"])
def test_a_wrong_key_opens_nothing(given: str) -> None:
    async def run() -> None:
        async with front(callers=Callers(KEY, required=True)) as here:
            key = b"authorization: Bearer " + given.encode("latin-1") + b"\r\n" if given else b""
            answer = await talk(here, sized(SENT, key))
            assert answer is not None
            if given.strip() == KEY:
                assert answer.status == 200
                return
            assert (answer.status, error_of(answer.body.decode())["code"]) == (401, "invalid_api_key")
            assert KEY not in answer.body.decode() + str(answer.headers)
            assert not here.canned.seen
            assert (await here.post(GOOD, Authorization=f"Bearer {KEY}"))[0] == 200

    asyncio.run(run())


@pytest.mark.parametrize(
    "field",
    [
        {"n": 10_000}, {"n": 0}, {"n": -1}, {"n": "2"}, {"n": 1.5}, {"n": True}, {"best_of": 10_000},
        {"max_tokens": 10**9}, {"max_completion_tokens": 10**9}, {"max_tokens": -1}, {"max_tokens": "many"},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.3/"}}]}]},
    ],
)  # fmt: skip
def test_what_is_beyond_the_limits_does_not_reach_the_engine(field: dict[str, Any]) -> None:
    async def run() -> None:
        async with front(policy=Policy(limits=Limits(max_tokens=4096, n=4))) as here:
            status, _, text = await here.post({**GOOD, **field})
            assert (status, error_of(text)["type"]) == (400, "invalid_request_error")
            assert not here.canned.seen
            await still_answers(here)

    asyncio.run(run())


# --- size and time ---


@pytest.mark.parametrize("announced", [True, False])
def test_a_hundred_megabytes_are_refused_and_not_taken_in(announced: bool) -> None:
    async def test(here: Front) -> None:
        reading, writing = await asyncio.open_connection("127.0.0.1", int(here.url.rpartition(":")[2]))
        size, part = 100 << 20, b" " * (1 << 20)
        head = b"content-length: %d\r\n\r\n" % size if announced else b"transfer-encoding: chunked\r\n\r\n"
        writing.write(POST + head)
        sent = 0
        reply = asyncio.create_task(reading.read(4000))
        while not reply.done() and sent < size:
            writing.write(part if announced else b"%x\r\n" % len(part) + part + b"\r\n")
            with contextlib.suppress(ConnectionError):
                await writing.drain()
            sent += len(part)
            await asyncio.sleep(0)
        answer = read_answer(await asyncio.wait_for(reply, 5))
        writing.close()
        assert (answer.status, error_of(answer.body.decode())["code"]) == (413, "request_too_large")
        assert sent < MOST_SENT
        await still_answers(here)

    in_front(test)


def test_a_client_that_sends_far_too_much_reads_why() -> None:
    """Who is cut off in the middle of sending reports a broken connection, and tries the same again."""

    def ask(here: Front) -> None:
        with openai.OpenAI(base_url=f"{here.url}/v1", api_key="x", max_retries=0, timeout=20) as client:
            message: Any = {"role": "user", "content": "a" * (4 * (8 << 20))}
            with pytest.raises(openai.APIStatusError) as caught:
                client.chat.completions.create(model="tickets", messages=[message])
            assert caught.value.status_code == 413

    async def test(here: Front) -> None:
        await asyncio.to_thread(ask, here)
        await still_answers(here)

    in_front(test)


@asynccontextmanager
async def hasty() -> AsyncIterator[str]:
    """The gateway's way of reading requests, with little patience; its address."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await send_json(send, 200, {"size": len(await read_body(scope, receive, 8 << 20, seconds=0.5))}, [])
        except Refusal as refusal:
            await send_refusal(send, refusal, [])

    listening = socket.create_server(("127.0.0.1", 0))
    server = http_server(app, drain_seconds=1, head_seconds=0.5, log_level="warning")
    answering = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        await answering


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([POST, *[b"x: y\r\n"] * 50], 408),
        ([POST + b"content-length: 40\r\n\r\n", *[b" "] * 50], 408),
        ([POST + b"transfer-encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 50], 408),
        ([sized(SENT)[:40], sized(SENT)[40:]], 200),
        ([b""], None),
    ],
)
def test_who_sends_drop_by_drop_is_cut_off(parts: list[bytes], status: int | None) -> None:
    async def run() -> None:
        async with hasty() as url, front() as here:
            here.url, gateway = url, here.url
            began = asyncio.get_running_loop().time()
            answer = await talk(here, *parts, pause=0.1)
            assert (answer.status if answer else None) == status
            assert asyncio.get_running_loop().time() - began < 7
            here.url = gateway
            await still_answers(here)

    asyncio.run(run())


def test_many_slow_heads_do_not_keep_others_waiting() -> None:
    async def test(here: Front) -> None:
        port = int(here.url.rpartition(":")[2])
        opened = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(200)))
        for _, writing in opened:
            writing.write(POST + b"x: ")
        async with asyncio.timeout(5):
            await still_answers(here)
        for _, writing in opened:
            writing.close()

    in_front(test)


# --- upstreams ---

JSON = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FIRST = b'10\r\ndata: {"a": 1}\n\n\r\n'
LEAK = b"Bearer engine-key at http://10.0.0.3:8000"


def whole(status: bytes, kind: bytes, body: bytes, more: bytes = b"") -> bytes:
    head = b"HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n" % (status, kind, len(body))
    return head + more + b"\r\n" + body


GARBAGE = {
    "html": whole(b"200 OK", b"text/html", b"<html>" + LEAK),
    "no JSON": whole(b"200 OK", b"application/json", b"{" + LEAK),
    "no object": whole(b"200 OK", b"application/json", b"[]"),
    "empty": whole(b"200 OK", b"application/json", b""),
    "too short": JSON + b'content-length: 100\r\n\r\n{"choi',
    "longer than said": JSON + b"content-length: 2\r\n\r\n{" + LEAK,
    "half a chunk": JSON + b'transfer-encoding: chunked\r\n\r\n40\r\n{"ch',
    "no chunk": JSON + b"transfer-encoding: chunked\r\n\r\nzz\r\n{" + LEAK,
    "binary": bytes(range(256)) * 8,
    "closed at once": b"",
    "no gzip": whole(b"200 OK", b"application/json", b"not gzip", b"content-encoding: gzip\r\n"),
    "its own error": whole(b"500 No", b"text/plain", LEAK),
    "its own error in OpenAI's form": whole(b"500 No", b"application/json", b'{"error": {"message": "%s"}}' % LEAK),
    "does not take our key": whole(b"401 No", b"application/json", b'{"error": {"message": "bad %s"}}' % LEAK),
    "leads elsewhere": b"HTTP/1.1 307 No\r\nlocation: http://127.0.0.1:9/x\r\ncontent-length: 0\r\n\r\n",
    "leads elsewhere by GET": b"HTTP/1.1 302 No\r\nlocation: http://127.0.0.1:9/x\r\ncontent-length: 0\r\n\r\n",
    "another protocol": b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nabc",
    "nothing, in good order": b"HTTP/1.1 204 No\r\n\r\n",
    "a status that is none": whole(b"999 No", b"application/json", b"{}"),
    "a type that is none": whole(b"200 OK", b"\xff\xfe", b"{}"),
    "a header inside a header": whole(b"200 OK", b"application/json\rx-evil: 1", b"{}"),
    "a head without end": b"HTTP/1.1 200 OK\r\nx: " + b"a" * 200_000,
    "a stream of nothing": EVENTS + b"0\r\n\r\n",
    "a stream of bytes": EVENTS + b"4\r\n\x00\xff\xfe\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_an_upstream_that_sends_garbage_is_not_passed_on(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def test(here: Front) -> None:
        async with broken_upstream(GARBAGE[kind]) as upstream, Engine(upstream.url, ENGINE_KEY) as engine:
            here.board.put("engine", Routes(public={"tickets": Route("tickets@2", engine)}))
            status, headers, text = await here.post(GOOD)
            assert status in (502, 503)
            error_of(text)
            assert headers["content-type"] == "application/json"
            assert not leaks(upstream.url, text + str(headers))
            assert 1 <= len(upstream.asked) <= 2
        assert "tickets@2" in caplog.text  # whoever runs it can find out why
        await still_answers(here)

    in_front(test)


@pytest.mark.parametrize("then", [b"", b"zz\r\n" + LEAK, b"0\r\n\r\n"])
def test_a_stream_that_breaks_off_ends_with_an_error(then: bytes) -> None:
    async def test(here: Front) -> None:
        async with broken_upstream(EVENTS) as upstream, Engine(upstream.url, ENGINE_KEY) as engine:
            upstream.then = [FIRST, then]
            here.board.put("engine", Routes(public={"tickets": Route("tickets@2", engine)}))
            status, _, text = await here.post({**GOOD, "stream": True})
            events = [line.removeprefix("data: ") for line in text.splitlines() if line]
            assert (status, events[0]) == (200, '{"a": 1}')
            assert error_of(events[-1])["code"] == "engine_broke"
            assert not leaks(upstream.url, text)
        await still_answers(here)

    in_front(test)


def test_a_compressed_answer_is_passed_on_whole() -> None:
    async def test(here: Front) -> None:
        packed = gzip.compress(b'{"choices": []}')
        answer = whole(b"200 OK", b"application/json", packed, b"content-encoding: gzip\r\n")
        async with broken_upstream(answer) as upstream, Engine(upstream.url, ENGINE_KEY) as engine:
            here.board.put("engine", Routes(public={"tickets": Route("tickets@2", engine)}))
            assert (await here.post(GOOD))[::2] == (200, '{"choices": []}')
        await still_answers(here)

    in_front(test)


def test_an_upstream_that_hangs_is_left_when_the_caller_leaves() -> None:
    async def test(here: Front) -> None:
        async with broken_upstream(b"", hangs=True) as upstream, Engine(upstream.url, ENGINE_KEY) as engine:
            here.board.put("engine", Routes(public={"tickets": Route("tickets@2", engine)}))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(here.post(GOOD), 0.5)
            async with asyncio.timeout(3):
                while here.board.in_flight:
                    await asyncio.sleep(0.02)
            assert len(upstream.asked) == 1
        await still_answers(here)

    in_front(test)


def test_a_schema_that_cannot_be_compiled_is_the_callers_error() -> None:
    """vLLM's own refusal, which names the field, is what the caller reads; it is not asked a second time."""

    async def test(here: Front) -> None:
        said = b'{"error": {"message": "Invalid JSON schema", "type": "BadRequestError", "param": null, "code": 400}}'
        answer = whole(b"400 Bad Request", b"application/json", said)
        schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
        async with broken_upstream(answer) as upstream, Engine(upstream.url, ENGINE_KEY) as engine:
            here.board.put("engine", Routes(public={"tickets": Route("tickets@2", engine)}))
            status, _, text = await here.post({**GOOD, "response_format": schema})
            assert (status, error_of(text)["message"]) == (400, "Invalid JSON schema")
            assert len(upstream.asked) == 1
        await still_answers(here)

    in_front(test)


def test_an_unknown_model_is_told_the_nearest_names() -> None:
    async def test(here: Front) -> None:
        status, _, text = await here.post({"model": "tikets"})
        assert (status, error_of(text)["param"]) == (404, "model")
        assert "there is: tickets" in error_of(text)["message"]

    in_front(test)


def leaks(url: str, text: str) -> bool:
    """Is the upstream's address, its port, or our key for it in the text?"""
    return any(each in text for each in (url, url.rpartition(":")[2], "127.0.0.1", "10.0.0.3", ENGINE_KEY, "Bearer"))
