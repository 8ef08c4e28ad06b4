"""Several gateways in front of one leader's engines: real processes, a real store, and an engine that is canned."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from registry.api_keys import add_key
from registry.gateways import GatewayRow, gateways, leave, renew
from registry.leases import MARGIN_SECONDS
from registry.project import Project
from registry.serve_recipe import ServeRecipe
from registry.served_routes import newer
from registry.serving_lead import LeadLost, leader, take_lead
from registry.store import Store
from serving.engine import Engine
from serving.following import Follower
from serving.leased import Lease
from serving.published import Published, PublishedEngine, read_routes, write_published
from serving.publishing import Publisher
from serving.routes import Away, Board, Route, Routes, Split
from tests.conftest import started
from tests.fakes.broken_line import line_to
from tests.fakes.canned_engine import CannedEngine, canned_engine
from tests.postgres_server import PostgresServer

TERM = 3.0
KEY = "key-of-the-engine"


@dataclass
class Process:
    """A leader or a gateway. What it prints is read in a thread, for a full pipe would stop it."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())

    def send(self, signal_: int) -> None:
        self.process.send_signal(signal_)

    async def said(self, what: str, seconds: float = 30) -> str:
        """The next line with `what` in it, which is then taken."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in [*self.lines]:
                if what in line:
                    self.lines.remove(line)
                    return line
            assert self.process.poll() is None, self.lines
            await asyncio.sleep(0.01)
        raise AssertionError(f"no {what!r} in {self.lines}")


class Leader(Process):
    async def lead(self, name: str) -> int:
        self.tell(f"lead {name}")
        return int(json.loads(await self.said("generation"))["generation"])

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()


@dataclass
class House:
    """Everything that a test starts, which ends with it."""

    store: Store
    canned: CannedEngine
    session: aiohttp.ClientSession
    stack: ExitStack

    async def leader(self) -> Leader:
        command = [sys.executable, "-m", "tests.serving.leading_process", self.canned.url, KEY, str(TERM)]
        # `started` closes standard input.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, start_new_session=True,
        )  # fmt: skip
        self.stack.callback(_end, process)
        found = Leader(process)
        await found.said("epoch")
        return found

    async def gateway(self, **environment: str) -> tuple[Process, str]:
        env = {"FT_LEASE_SECONDS": str(TERM), "FT_GATEWAY_HOST": "127.0.0.1", **environment}
        command = [sys.executable, "-m", "cli.main", "serve", "gateway", "--port", "0"]
        process = self.stack.enter_context(started(command, env, Path.cwd(), stderr=subprocess.STDOUT))
        found = Process(process)
        url = (await found.said("gateway http")).split()[-1].removesuffix("/v1")
        return found, url

    async def ask(self, url: str, model: str = "tickets", **more: Any) -> tuple[int, str, dict[str, str]]:
        """Status, the version that answered, headers."""
        body = {"model": model, "messages": [{"role": "user", "content": "?"}], **more}
        async with self.session.post(f"{url}/v1/chat/completions", json=body) as got:
            await got.read()
            return got.status, got.headers.get("x-ft-adapter", ""), {k.lower(): v for k, v in got.headers.items()}

    async def begin(self, url: str) -> aiohttp.ClientResponse:
        """A stream of which a part has come; it goes on when the engine's gate opens."""
        self.canned.faults.append("stall")
        body = {"model": "tickets", "messages": [], "stream": True}
        answer = await self.session.post(f"{url}/v1/chat/completions", json=body)
        await answer.content.readany()
        return answer

    async def until(self, url: str, version: str, seconds: float = 10) -> None:
        """Return when that version answers."""
        deadline = time.monotonic() + seconds
        while (last := await self.ask(url))[:2] != (200, version):
            assert time.monotonic() < deadline, last
            await asyncio.sleep(0.02)

    async def acknowledged(self, generation: int, gateways_: int = 1, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while sum(each.acknowledged >= generation for each in gateways(self.store)) < gateways_:
            assert time.monotonic() < deadline, gateways(self.store)
            await asyncio.sleep(0.02)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


@asynccontextmanager
async def house(store: Store) -> AsyncIterator[House]:
    with ExitStack() as stack:
        async with canned_engine() as canned, aiohttp.ClientSession() as session:
            yield House(store, canned, session, stack)


def test_gateways_follow_each_flip_and_hold_up_an_unload_by_what_they_have_under_way(either_store: Store) -> None:
    async def run() -> None:
        async with house(either_store) as here:
            leading = await here.leader()
            (_, one), (_, two) = await asyncio.gather(here.gateway(), here.gateway())
            await leading.lead("tickets@1")
            await asyncio.gather(here.until(one, "tickets@1"), here.until(two, "tickets@1"))
            assert (await here.ask(one, "nobody"))[0] == 404
            assert here.canned.seen[-1][0]["Authorization"] == f"Bearer {KEY}"
            stream = await here.begin(two)
            assert stream.headers["x-ft-adapter"] == "tickets@1"
            flipped = await leading.lead("tickets@2")
            await asyncio.gather(here.until(one, "tickets@2"), here.until(two, "tickets@2"))
            await here.acknowledged(flipped, 2)
            leading.tell("unload tickets@1")
            await asyncio.sleep(TERM + MARGIN_SECONDS + 1)  # a live gateway holds it up for as long as it wants
            assert not leading.lines
            here.canned.gate.set()
            assert "[DONE]" in (await stream.read()).decode()
            await leading.said('"unload": "tickets@1"', 2)
            assert KEY not in str(newer(either_store, 0))

    asyncio.run(run())


def test_a_gateway_without_a_leader_says_so(store: Store) -> None:
    async def run() -> None:
        async with house(store) as here:
            process, _ = await here.gateway()
            await process.said("no server leads yet")

    asyncio.run(run())


def test_a_frozen_gateway_is_waited_for_until_its_leases_end_and_then_answers_503_until_it_follows_again(
    store: Store,
) -> None:
    async def run() -> None:
        async with house(store) as here:
            leading = await here.leader()
            frozen, url = await here.gateway()
            await leading.lead("tickets@1")
            await here.until(url, "tickets@1")
            stream = await here.begin(url)
            frozen.send(signal.SIGSTOP)
            stopped = time.monotonic()
            try:
                await leading.lead("tickets@2")
                leading.tell("unload tickets@1")
                asking = asyncio.create_task(here.ask(url))  # lies in its socket meanwhile
                await leading.said("unload", 30)
                waited = time.monotonic() - stopped
                assert waited + TERM / 5 + 0.5 >= TERM, "its lease may have been renewed a fifth of its term before"
                assert waited < TERM + MARGIN_SECONDS + 3
            finally:
                frozen.send(signal.SIGCONT)
            status, version, headers = await asking
            # It may have heard of the new generation before it looked at the request, but never answers by the old one.
            assert (status, version) in {(503, ""), (200, "tickets@2")}, (status, version)
            assert status == 200 or int(headers["retry-after"]) > 0
            await here.until(url, "tickets@2")
            here.canned.gate.set()
            await stream.read()

    asyncio.run(run())


def test_a_gateway_cut_off_from_the_store_answers_until_its_leases_end_and_comes_back_by_itself(
    project: Project, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry.store import open_store

    url = postgres.new_database(f"gateways-{os.getpid()}")
    monkeypatch.setenv("FT_DATABASE_URL", url)
    store = open_store(project)

    async def run(how: str) -> None:
        with line_to(f"http://127.0.0.1:{postgres.port}") as line:
            async with house(store) as here:
                leading = await here.leader()
                cut, door = await here.gateway(
                    FT_DATABASE_URL=url.replace(str(postgres.port), line.url.rpartition(":")[2])
                )
                _, other = await here.gateway()
                await leading.lead("tickets@1")
                await asyncio.gather(here.until(door, "tickets@1"), here.until(other, "tickets@1"))
                line.cut() if how == "cut" else line.hang()
                began = time.monotonic()
                await leading.lead("tickets@2")
                await here.until(other, "tickets@2")
                leading.tell("unload tickets@1")
                answered = 0.0
                while (last := await here.ask(door))[0] == 200:
                    assert last[1] == "tickets@1", "it stays on its generation"
                    answered = time.monotonic() - began
                    await asyncio.sleep(0.05)
                assert TERM * 0.6 < answered <= TERM
                assert not leading.lines, "unloaded while a gateway answered by it"
                assert last[0] == 503
                assert int(last[2]["retry-after"]) > 0
                async with here.session.get(f"{door}/health") as health:
                    assert (health.status, (await health.json())["status"]) == (503, "cut off")
                await leading.said("unload", 15)
                assert (await here.ask(other))[1] == "tickets@2"
                line.mend()
                await here.until(door, "tickets@2", 30)
                cut.send(signal.SIGTERM)
                assert await asyncio.to_thread(cut.process.wait, 15) == 0

    for how in ("cut", "hang"):
        asyncio.run(run(how))


def test_rules_limits_and_keys_of_callers_are_the_leaders(store: Store) -> None:
    recipe = {
        "kind": "serve", "name": "house", "engines": {"desk": {"base": {"model": "org/small@main"}}},
        "routes": {"help": {"model": "tickets", "limits": {"max_tokens": 10}}},
        "rules": [{"when": {"keywords": ["refund"]}, "route": "help"}],
    }  # fmt: skip

    async def run() -> None:
        async with house(store) as here:
            leading = await here.leader()
            _, url = await here.gateway()
            await leading.lead("tickets@1")
            leading.tell(f"recipe {json.dumps(recipe)}")
            generation = json.loads(await leading.said("generation"))["generation"]
            await here.acknowledged(generation)
            await here.until(url, "tickets@1")
            assert (await here.ask(url, "help"))[:2] == (200, "tickets@1")
            asked = [{"role": "user", "content": "A refund, please"}]
            assert (await here.ask(url, "auto", messages=asked))[:2] == (200, "tickets@1")
            assert (await here.ask(url, "help", max_tokens=11))[0] == 400
            key = add_key(store, "app", routes=None, rate=None, by_whom="test")
            deadline = time.monotonic() + 10
            while (await here.ask(url, "help"))[0] != 401:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            here.session.headers["Authorization"] = f"Bearer {key}"
            assert (await here.ask(url, "help"))[0] == 200

    asyncio.run(run())


def test_a_request_at_a_gateway_has_the_leader_start_an_engine_on_demand(store: Store) -> None:
    engines = {"desk": {"base": {"model": "org/small@main"}, "start": "demand"}}
    recipe = {"kind": "serve", "name": "house", "engines": engines}

    async def run() -> None:
        async with house(store) as here:
            leading = await here.leader()
            _, url = await here.gateway()
            leading.tell(f"recipe {json.dumps(recipe)}")
            await leading.said("generation")
            leading.tell("off desk")
            await here.acknowledged(json.loads(await leading.said("generation"))["generation"])
            await asyncio.sleep(0.2)
            asking = asyncio.create_task(here.ask(url))
            await leading.said('"want": "desk"', 5)
            assert not asking.done()
            await leading.lead("tickets@1")
            assert (await asking)[:2] == (200, "tickets@1")

    asyncio.run(run())


def test_kill_9_of_a_gateway_and_of_the_leader(either_store: Store) -> None:
    async def run() -> None:
        async with house(either_store) as here:
            first = await here.leader()
            (killed, one), (_, two) = await asyncio.gather(here.gateway(), here.gateway())
            generation = await first.lead("tickets@1")
            await asyncio.gather(here.until(one, "tickets@1"), here.until(two, "tickets@1"))
            killed.send(signal.SIGKILL)
            await first.lead("tickets@2")
            first.tell("unload tickets@1")
            await here.until(two, "tickets@2")
            await first.said("unload", TERM + MARGIN_SECONDS + 5)
            first.send(signal.SIGKILL)
            await asyncio.to_thread(first.process.wait, 10)
            assert (await here.ask(two))[:2] == (200, "tickets@2"), "nobody leads, and it answers on"
            second = await here.leader()
            assert await second.lead("tickets@3") > generation
            await here.until(two, "tickets@3")
            now = leader(either_store)
            assert now is not None
            assert now.epoch == 2
            second.tell("end")
            await asyncio.to_thread(second.process.wait, 15)
            assert (await here.ask(two))[0] == 503, "the leader has ended, and said so"

    asyncio.run(run())


@contextmanager
def leading(store: Store) -> Iterator[tuple[Publisher, Board]]:
    board = Board()
    yield Publisher(store, take_lead(store, "here", TERM, alone=True), board), board


def route(name: str, engine: Engine) -> dict[str, Route]:
    return {"tickets": Route(name, engine)}


def test_what_a_gateway_does_not_know_of_yet_is_not_unloaded(store: Store) -> None:
    async def run() -> None:
        async with Engine("http://127.0.0.1:1", KEY) as engine:
            with leading(store) as (publisher, board):
                row = GatewayRow("g", "desk", "", 0.0, TERM)
                renew(store, row)
                board.put("engine", Routes(public=route("tickets@1", engine), internal={"x": Route("x", engine)}))
                assert await publisher.publish() == 1
                assert await publisher.publish() == 1, "nothing has changed"
                assert not await publisher.may_unload(engine, "tickets@1"), "it answers"
                renew(store, replace(row, acknowledged=1))
                assert not await publisher.may_unload(engine, "x"), "the internal key could reach it there"
                assert publisher.generation == 2
                renew(store, replace(row, acknowledged=2))
                assert await publisher.may_unload(engine, "x")
                assert not await publisher.may_unload(engine, "tickets@1")
                board.put("engine", Routes(public={**route("tickets@1", engine), "x": Route("x", engine)}))
                assert not await publisher.may_unload(engine, "x"), "it is wanted again"
                renew(store, replace(row, acknowledged=await publisher.publish()))
                board.put("engine", Routes(public=route("tickets@1", engine)))
                assert not await publisher.may_unload(engine, "x"), "it has gone for the second time, unheard"
                renew(store, replace(row, acknowledged=4))
                assert await publisher.may_unload(engine, "x")
                assert not await publisher.drained(engine, 0.2)
                board.put("engine", Routes(away={"tickets": Away("drained")}))
                assert not await publisher.drained(engine, 0.2)
                renew(store, replace(row, acknowledged=5, in_flight=frozenset({("tickets@1", engine.url)})))
                assert not await publisher.drained(engine, 0.2)
                renew(store, replace(row, acknowledged=5))
                assert await publisher.drained(engine, 0.2)

    asyncio.run(run())


def test_what_other_gateways_want_and_use_is_heard(store: Store) -> None:
    async def run() -> None:
        async with Engine("http://127.0.0.1:1", KEY) as engine:
            wanted: set[str] = set()
            lead = take_lead(store, "here", TERM, alone=True)
            leading, board = Board(), Board()
            leading.put("engine", Routes(away={"tickets": Away("it made room", want=lambda: wanted.add("tickets"))}))
            publisher = Publisher(store, lead, leading, want=wanted.add)
            published: list[Published] = []
            row = GatewayRow("g", "desk", "", 0.0, TERM)
            follower = Follower(lambda: store, row, board, published.append, lambda: frozenset({"big", "tickets"}))
            await publisher.publish()
            with board.counted(Route("tickets@1", engine)):
                await follower.step()
            running = asyncio.create_task(publisher.run())
            while wanted != {"big", "tickets"} or not publisher.last_used(engine):
                await asyncio.sleep(0.05)
            assert leading.used["tickets@1"]
            want = read_routes(published[0], {}, wanted.discard).away["tickets"].want
            assert want is not None
            want()
            assert wanted == {"big"}, "who waits at that gateway calls by the public name"
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_write_that_failed_may_have_been_done(store: Store) -> None:
    """The row was written and the answer lost; the flip back makes the text what was written before it."""

    async def run() -> None:
        async with Engine("http://127.0.0.1:1", KEY) as engine:
            with leading(store) as (publisher, board):
                board.put("engine", Routes())
                await publisher.publish()
                board.put("engine", Routes(public=route("tickets@1", engine)))
                with store.writing() as connection:  # nobody can write now
                    waiting = asyncio.create_task(publisher.publish())
                    await asyncio.sleep(0.1)
                    waiting.cancel()
                    await asyncio.gather(waiting, return_exceptions=True)
                    del connection
                board.put("engine", Routes())
                renew(store, GatewayRow("g", "desk", "", 0.0, TERM, acknowledged=1))
                assert not await publisher.may_unload(engine, "tickets@1")
                assert publisher.generation > 1
                leave(store, "g")
                assert await publisher.may_unload(engine, "tickets@1")

    asyncio.run(run())


def test_a_leader_that_lost_the_lead_stops(store: Store) -> None:
    async def run() -> None:
        async with Engine("http://127.0.0.1:1", KEY) as engine:
            with leading(store) as (publisher, board):
                running = asyncio.create_task(publisher.run())
                await asyncio.sleep(0.1)
                take_lead(store, "there", TERM, alone=True)
                board.put("engine", Routes(public=route("tickets@1", engine)))
                with pytest.raises(LeadLost):
                    await asyncio.wait_for(running, 5)
                with pytest.raises(LeadLost):
                    await publisher.may_unload(engine, "tickets@9")

    asyncio.run(run())


def test_published_routes_come_back_as_they_were_and_have_no_key_in_them() -> None:
    async def run() -> None:
        async with Engine("http://one", "secret-1") as one, Engine("http://two", "secret-2") as two:
            stable, new = Route("tickets@1", one), Route("tickets@2", one)
            routes = Routes(
                public={"tickets": stable, "big": Route("llama", two)}, internal={"base": Route("base", one)},
                away={"letters": Away("loading", 7, hold=False)}, closed={"old": "no champion"},
                splits={"tickets": Split(stable, new, 5.0, "salt")},
                engines={"desk": Route("base", one), "far": Route("llama", two), "gone": Away("stopped")},
            )  # fmt: skip
            terms = {
                "desk": {"base": {"model": "org/small@main"}},
                "far": {"url": "http://two"},
                "near": {"url": "http://three", "key": "${NEAR_KEY}"},
            }
            recipe = ServeRecipe.model_validate({"kind": "serve", "name": "house", "engines": terms})
            text = write_published(routes, recipe, {Route("base", one)}, lambda _: "s")
            assert "secret" not in text
            assert "${NEAR_KEY}" in text
            published = Published.model_validate_json(text)
            assert published.engines == {
                one.url: PublishedEngine(start="s"),
                two.url: PublishedEngine(start="s", name="far"),
            }
            assert read_routes(published, {one.url: one, two.url: two}) == replace(routes, internal={})
            without = read_routes(published, {one.url: one})
            assert "FT_ENGINE_KEY" in without.away["big"].reason
            assert without.public == {"tickets": stable}
            assert ServeRecipe.model_validate(published.recipe).engines["far"].url == "http://two"

    asyncio.run(run())


def test_a_lease_lasts_from_the_beginning_of_its_renewal() -> None:
    now = 100.0
    lease = Lease(10, lambda: now)
    assert not lease.lasts
    assert lease.renewed(95, 7, 7)
    assert not lease.renewed(99, 7, 8)
    now = 104.9
    assert lease.lasts
    now = 105.0
    assert not lease.lasts
