"""The gateway over real HTTP, in front of an engine that answers and fails as it is told."""

from __future__ import annotations

import asyncio
import io
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest

from serving.engine import Engine
from serving.gateway import Gateway
from serving.listening import http_server
from serving.routes import Away, Board, Route, Routes
from tests.fakes.canned_engine import CannedEngine, canned_engine

KEY = "internal-key"
CHAT = "/v1/chat/completions"


@dataclass
class Front:
    """A gateway with one engine behind it: `tickets` -> tickets@2, tickets@1 previous, tickets@3 unjudged."""

    url: str
    gateway: Gateway
    board: Board
    canned: CannedEngine
    engine: Engine
    session: aiohttp.ClientSession

    def routes(self) -> Routes:
        def lead(*names: str) -> dict[str, Route]:
            return {name: Route(name, self.engine) for name in names}

        named = lead("tickets@1", "tickets@2")
        return Routes(
            public={**named, "tickets": Route("tickets@2", self.engine)},
            internal=lead("tickets@1", "tickets@2", "tickets@3", "base"),
            closed={"letters": "it has no champion yet"},
        )

    async def post(self, body: Any, path: str = CHAT, **headers: str) -> tuple[int, dict[str, str], str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(self.url + path, data=data, headers=headers) as got:
            return got.status, {key.lower(): value for key, value in got.headers.items()}, await got.text()


@asynccontextmanager
async def front(hold_seconds: float = 0.4, **given: Any) -> AsyncIterator[Front]:
    """`given`: more of the gateway's arguments."""
    board = Board()
    gateway = Gateway(board, KEY, hold_seconds, **given)
    listening = socket.create_server(("127.0.0.1", 0))
    server = http_server(gateway, drain_seconds=5, log_level="warning")
    answering = asyncio.create_task(server.serve(sockets=[listening]))
    async with (
        canned_engine() as canned,
        Engine(canned.url, "engine-key") as engine,
        aiohttp.ClientSession() as session,
    ):
        here = Front(f"http://127.0.0.1:{listening.getsockname()[1]}", gateway, board, canned, engine, session)
        board.put("engine", here.routes())
        try:
            yield here
        finally:
            await session.close()
            server.should_exit = True
            await answering


def in_front(test: Callable[[Front], Awaitable[None]], **given: Any) -> None:
    async def run() -> None:
        async with front(**given) as here:
            await test(here)

    asyncio.run(run())


def error_of(text: str) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_public_name_leads_to_the_champion_and_nothing_of_the_caller_leaks() -> None:
    async def test(here: Front) -> None:
        body = {"model": "tickets", "messages": [], "made_up_field": [1]}
        status, headers, text = await here.post(body, Authorization="Bearer callers-own", **{"X-Request-Id": "abc-1"})
        assert (status, headers["x-ft-adapter"], headers["x-request-id"]) == (200, "tickets@2", "abc-1")
        assert json.loads(text)["choices"][0]["message"]["content"] == "one two three"
        seen, passed = here.canned.seen[0]
        assert passed == {**body, "model": "tickets@2"}
        assert seen["Authorization"] == "Bearer engine-key"
        assert "callers-own" not in str(seen)
        assert not here.board.in_flight

    in_front(test)


def test_a_stream_is_passed_on_as_it_comes() -> None:
    async def test(here: Front) -> None:
        here.canned.faults = ["stall"]
        async with here.session.post(here.url + CHAT, json={"model": "tickets", "stream": True}) as got:
            first = await asyncio.wait_for(got.content.readany(), 2)
            assert b"one " in first
            assert b"two" not in first
            assert here.board.in_flight == {Route("tickets@2", here.engine): 1}
            here.canned.gate.set()
            rest = await got.content.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert got.headers["content-type"].startswith("text/event-stream")

    in_front(test)


def test_a_flip_leaves_what_has_begun_where_it_was() -> None:
    async def test(here: Front) -> None:
        here.canned.faults = ["stall"]
        async with here.session.post(here.url + CHAT, json={"model": "tickets", "stream": True}) as got:
            await got.content.readany()
            routes = here.routes()
            here.board.put("engine", Routes(public={**routes.public, "tickets": Route("tickets@1", here.engine)}))
            _, headers, _ = await here.post({"model": "tickets"})
            assert headers["x-ft-adapter"] == "tickets@1"
            assert here.board.in_flight == {Route("tickets@2", here.engine): 1}
            here.canned.gate.set()
            assert b"tickets@2" in await got.content.read()

    in_front(test)


@pytest.mark.parametrize(
    ("name", "key", "status"),
    [
        ("tickets@1", "", 200),
        ("tickets@3", "", 404),
        ("tickets@3", "wrong", 404),
        ("tickets@3", KEY, 200),
        ("base", "", 404),
        ("base", KEY, 200),
        ("tickets@9", KEY, 404),
    ],
)
def test_versions_without_a_verdict_need_the_internal_key(name: str, key: str, status: int) -> None:
    async def test(here: Front) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        got, _, _ = await here.post({"model": name}, **headers)
        assert got == status

    in_front(test)


@pytest.mark.parametrize(
    ("body", "status", "code", "says"),
    [
        (b"{", 400, "invalid_json", "not JSON"),
        (b"\xff\xfe", 400, "invalid_json", "not JSON"),
        (b"[" * 100_000, 400, "invalid_json", "not JSON"),
        (b"[]", 400, "invalid_json", "object"),
        (b"{}", 400, "invalid_model", "model"),
        (b'{"model": 3}', 400, "invalid_model", "model"),
        (b'{"model": "ticket"}', 404, "model_not_found", "tickets"),
        (b'{"model": "letters"}', 404, "model_not_served", "no champion yet"),
    ],
)
def test_bad_requests_get_openai_errors(body: bytes, status: int, code: str, says: str) -> None:
    async def test(here: Front) -> None:
        got, headers, text = await here.post(body)
        error = error_of(text)
        assert (got, error["code"]) == (status, code)
        assert says in error["message"]
        assert headers["x-request-id"]
        assert not here.canned.seen

    in_front(test)


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_not_taken(announced: bool) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(((8 << 20) >> 20) + 1):
            yield b" " * (1 << 20)

    async def test(here: Front) -> None:
        data: Any = io.BytesIO(b" " * ((8 << 20) + 1)) if announced else parts()
        async with here.session.post(here.url + CHAT, data=data) as got:
            assert (got.status, error_of(await got.text())["code"]) == (413, "request_too_large")

    in_front(test)


def test_headers_without_end_are_refused() -> None:
    async def test(here: Front) -> None:
        reading, writing = await asyncio.open_connection("127.0.0.1", int(here.url.rpartition(":")[2]))
        writing.write(b"POST /v1/chat/completions HTTP/1.1\r\n")
        for _ in range(80):
            writing.write(b"X: " + b"a" * 1000 + b"\r\n")
        assert (await reading.readline()).startswith(b"HTTP/1.1 431")
        writing.close()
        assert (await here.post({"model": "tickets", "messages": []}, **{"X-Long": "a" * 6000}))[0] == 200

    in_front(test)


def test_only_the_few_paths_answer() -> None:
    async def test(here: Front) -> None:
        for path in ("/", "/v1/load_lora_adapter", "/tokenize", "/v1/responses", "/invocations"):
            got, _, text = await here.post({"model": "tickets"}, path=path)
            assert (got, error_of(text)["code"]) == (404, "not_found")
        async with here.session.get(here.url + CHAT) as answer:
            assert answer.status == 405
        async with here.session.get(here.url + "/v1/models") as answer:
            names = [each["id"] for each in (await answer.json())["data"]]
        assert names == ["tickets@1", "tickets@2", "tickets"]
        routes = here.routes()
        here.board.put("engine", replace(routes, away={"tickets@4": Away("it was refused", hold=False)}))
        async with here.session.get(here.url + "/health") as answer:
            assert (answer.status, (await answer.json())["reasons"]) == (200, ["it was refused"])
        for engine, status in (("big", 200), ("", 503)):
            here.board.put("engine", Routes(away={"tickets": Away("it is off", engine=engine)}))
            async with here.session.get(here.url + "/health") as answer:
                assert answer.status == status, "an engine on demand that nobody wants is as it should be"

    in_front(test)


@pytest.mark.parametrize("fault", ["close", "error", "stream-error"])
def test_an_engine_that_breaks_before_the_first_byte_is_asked_once_more(fault: Any) -> None:
    async def test(here: Front) -> None:
        here.canned.faults = [fault]
        status, _, text = await here.post({"model": "tickets", "stream": fault == "stream-error"})
        assert status == 200
        assert "three" in text
        assert len(here.canned.seen) == 2

    in_front(test)


def test_an_engine_that_breaks_twice_gives_a_clean_error() -> None:
    async def test(here: Front) -> None:
        here.canned.faults = ["close", "close"]
        status, headers, text = await here.post({"model": "tickets"})
        assert (status, error_of(text)["code"], headers["retry-after"]) == (503, "engine_away", "5")
        assert len(here.canned.seen) == 2

    in_front(test)


def test_a_stream_that_is_cut_ends_with_an_error_and_is_not_started_again() -> None:
    async def test(here: Front) -> None:
        here.canned.faults = ["cut"]
        status, _, text = await here.post({"model": "tickets", "stream": True})
        assert status == 200
        assert "one " in text
        events = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert json.loads(events[-1])["error"]["code"] == "engine_broke"
        assert "[DONE]" not in text
        assert len(here.canned.seen) == 1

    in_front(test)


def test_the_engine_stops_when_the_caller_leaves() -> None:
    async def test(here: Front) -> None:
        here.canned.faults = ["stall"]
        async with here.session.post(here.url + CHAT, json={"model": "tickets", "stream": True}) as got:
            await got.content.readany()
        got.close()
        async with asyncio.timeout(3):
            while here.board.in_flight or not here.canned.aborted:
                await asyncio.sleep(0.02)

    in_front(test)


def test_a_request_is_held_for_a_moment_while_the_engine_is_away() -> None:
    async def test(here: Front) -> None:
        here.board.put("engine", Routes(away={"tickets": Away("its engine is restarting")}))
        held = asyncio.create_task(here.post({"model": "tickets"}))
        await asyncio.sleep(0.15)
        here.board.put("engine", here.routes())
        assert (await held)[0] == 200
        here.board.put("engine", Routes(away={"tickets": Away("its engine is restarting", retry_after=7)}))
        status, headers, text = await here.post({"model": "tickets"})
        assert (status, headers["retry-after"]) == (503, "7")
        assert "restarting" in error_of(text)["message"]
        async with here.session.get(here.url + "/health") as answer:
            assert answer.status == 503

    in_front(test)


def test_a_request_whose_engine_is_gone_moves_to_the_next_one() -> None:
    async def test(here: Front) -> None:
        async with Engine("http://127.0.0.1:9", "dead") as dead:
            here.board.put("engine", Routes(public={"tickets": Route("tickets@2", dead)}))
            held = asyncio.create_task(here.post({"model": "tickets"}))
            await asyncio.sleep(0.15)
            here.board.put("engine", here.routes())
            status, headers, _ = await held
            assert (status, headers["x-ft-adapter"]) == (200, "tickets@2")

    in_front(test)
