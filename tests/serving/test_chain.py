"""Who answers: the route's own target, then its fallbacks, by real engines that fail as they are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from registry.serve_recipe import EngineTerms, RouteTerms
from serving.ask import Ask
from serving.breakers import Bounds
from serving.chain import Chain
from serving.engine import Engine
from serving.gateway import Gateway
from serving.http_messages import Refusal
from serving.providers import Providers
from serving.remote_engine import RemoteEngine
from serving.routes import Away, Board, Route, Routes, Split
from serving.targets import Target, targets_of
from tests.fakes.canned_engine import CannedEngine, canned_engine
from tests.fakes.told import Told

CHAT = "/v1/chat/completions"
NEVER = Bounds(least=1000)
WITH_BIG = {"model": "tickets", "fallbacks": [{"engine": "big"}]}
ALL = {"model": "tickets", "openai": "gpt-x", "fallbacks": [{"engine": "big", "as": "large"}, {"openai": "gpt-y"}]}


@dataclass
class Counted:
    fallbacks: list[tuple[str, str]] = field(default_factory=list)
    breakers: list[tuple[str, str]] = field(default_factory=list)
    repairs: list[tuple[str, bool]] = field(default_factory=list)

    def fell_back(self, route: str, upstream: str) -> None:
        self.fallbacks.append((route, upstream))

    def breaker(self, upstream: str, state: str) -> None:
        self.breakers.append((upstream, state))

    def repaired(self, route: str, ok: bool) -> None:
        self.repairs.append((route, ok))


@dataclass
class Line:
    """`tickets` -> tickets@2 on `ours`; `big` is an engine with a model of its own; OpenAI stands behind."""

    chain: Chain
    board: Board
    ours: CannedEngine
    big: CannedEngine
    openai: CannedEngine
    engine: Engine
    far: RemoteEngine
    counted: Counted

    def routes(self) -> Routes:
        return Routes(
            public={"tickets": Route("tickets@2", self.engine)},
            internal={"tickets@3": Route("tickets@3", self.engine)},
            engines={"ours": Route("base", self.engine), "big": Route("big-70b", self.far)},
        )

    async def ask(self, terms: dict[str, Any] | None = None, told: Told | None = None, **request: Any) -> Told:
        told = told or Told()
        asked = {"model": "tickets", "messages": [{"role": "user", "content": "hi"}], **request}
        ask = Ask(CHAT, asked, "tickets", "tickets", RouteTerms.model_validate(terms or {"model": "tickets"}), False,
                  [(b"x-request-id", b"r-1")], user="someone")  # fmt: skip
        await self.chain.answer(ask, told.send)
        assert not self.board.in_flight
        return told

    async def refused(self, terms: dict[str, Any] | None = None, told: Told | None = None, **request: Any) -> Refusal:
        told = told or Told()
        with pytest.raises(Refusal) as caught:
            await self.ask(terms, told, **request)
        assert not told.status
        for address in (self.ours.url, self.big.url, self.openai.url, "127.0.0.1", "secret-key"):
            assert address not in caught.value.message
        return caught.value


@asynccontextmanager
async def line(hold_seconds: float = 0.3, bounds: Bounds = NEVER) -> AsyncIterator[Line]:
    board, counted = Board(["engine", "remote"]), Counted()
    async with (
        canned_engine() as ours,
        canned_engine() as big,
        canned_engine() as openai,
        Engine(ours.url, "engine-key") as engine,
    ):
        providers = Providers(board, {"OPENAI_BASE_URL": f"{openai.url}/v1", "OPENAI_API_KEY": "secret-key"})
        far = RemoteEngine("big", big.url, "secret-key-2", local=False)
        chain = Chain(board, hold_seconds, providers=providers, counts=counted, bounds=bounds)
        here = Line(chain, board, ours, big, openai, engine, far, counted)
        board.put("engine", here.routes())
        try:
            yield here
        finally:
            await providers.close()
            await far.close()


def on_line(test: Callable[[Line], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with line(**options) as here:
            await test(here)

    asyncio.run(run())


def test_the_routes_own_target_answers_first() -> None:
    async def test(here: Line) -> None:
        told = await here.ask(ALL)
        assert (told.status, told.headers["x-ft-adapter"], told.said) == (200, "tickets@2", "one two three")
        assert "x-ft-fallback" not in told.headers
        assert "x-ft-held" not in told.headers
        assert told.headers["x-request-id"] == "r-1"
        assert not here.big.seen
        assert not here.counted.fallbacks

    on_line(test)


@pytest.mark.parametrize("fault", ["close", "error", "garbage", "redirect", "lost", "busy", "stream-error"])
def test_the_next_one_answers_when_the_first_cannot(fault: Any) -> None:
    async def test(here: Line) -> None:
        here.ours.faults = [fault]
        told = await here.ask(ALL, stream=fault == "stream-error")
        assert (told.status, told.headers["x-ft-adapter"]) == (200, "engine:big/large")
        assert told.headers["x-ft-fallback"] == "1"
        assert told.said == "one two three"
        assert here.big.seen[0][1]["model"] == "large"
        assert here.big.seen[0][0]["Authorization"] == "Bearer secret-key-2"
        assert len(here.ours.seen) == 1
        assert here.counted.fallbacks == [("tickets", "big")]

    on_line(test)


def test_after_two_failures_the_third_answers_under_its_own_name() -> None:
    async def test(here: Line) -> None:
        here.ours.faults, here.big.faults = ["error"], ["close"]
        told = await here.ask(ALL, max_tokens=5)
        assert (told.headers["x-ft-adapter"], told.headers["x-ft-fallback"]) == ("openai/gpt-y", "2")
        headers, body = here.openai.seen[0]
        assert headers["Authorization"] == "Bearer secret-key"
        assert (body["model"], body["max_completion_tokens"]) == ("gpt-y", 5)
        assert "max_tokens" not in body

    on_line(test)


def test_a_callers_own_mistake_goes_to_nobody_else() -> None:
    async def test(here: Line) -> None:
        here.ours.faults = ["refuse"]
        told = await here.ask(WITH_BIG)
        assert (told.status, told.events[0]["error"]["type"]) == (400, "BadRequestError")
        assert not here.big.seen
        here.ours.faults, here.big.faults = ["error"], ["refuse"]
        refusal = await here.refused(WITH_BIG)  # what somebody else's engine says may name its address
        assert (refusal.status, refusal.code, refusal.message) == (400, "refused", "canned at …")

    on_line(test)


def test_an_engine_that_hangs_is_given_up_for_the_next() -> None:
    async def test(here: Line) -> None:
        here.ours.always = "hang"
        terms = {**WITH_BIG, "limits": {"first_token": "1s"}}
        for stream in (False, True):
            began = time.monotonic()
            told = await here.ask(terms, stream=stream)
            assert told.headers["x-ft-fallback"] == "1"
            assert 0.9 < time.monotonic() - began < 2

    on_line(test)


def test_comments_are_no_first_token() -> None:
    async def test(here: Line) -> None:
        here.ours.faults = ["comments"]
        told = await here.ask({**WITH_BIG, "limits": {"first_token": "1s"}}, stream=True)
        assert told.headers["x-ft-fallback"] == "1"

    on_line(test)


def test_an_engine_that_hangs_with_nobody_behind_it_is_a_504() -> None:
    async def test(here: Line) -> None:
        here.ours.always = "hang"
        refusal = await here.refused({"model": "tickets", "limits": {"first_token": "1s"}}, stream=True)
        assert (refusal.status, refusal.code) == (504, "engine_timeout")
        # An answer that is no stream begins when it is ready: only its whole time counts.
        here.ours.seen.clear()
        asking = asyncio.create_task(here.ask({"model": "tickets", "limits": {"first_token": "1s"}}))
        await asyncio.sleep(1.3)
        here.ours.gate.set()
        assert (await asking).status == 200
        assert len(here.ours.seen) == 1
        here.ours.gate.clear()
        refusal = await here.refused({"model": "tickets", "limits": {"timeout": "1s"}})
        assert refusal.status == 504

    on_line(test)


def test_a_whole_answer_has_its_time_and_a_stream_ends_cleanly() -> None:
    async def test(here: Line) -> None:
        here.ours.faults = ["stall"]
        told = await here.ask({**WITH_BIG, "limits": {"timeout": "1s"}}, stream=True)
        assert told.status == 200
        assert told.events[-1]["error"]["code"] == "answer_timeout"
        assert told.is_over
        assert not told.is_whole
        assert not here.big.seen

    on_line(test)


def test_after_the_first_byte_nobody_else_is_asked() -> None:
    async def test(here: Line) -> None:
        here.ours.faults = ["cut"]
        told = await here.ask(WITH_BIG, stream=True)
        assert told.events[0]["choices"][0]["delta"]["content"] == "one "
        assert told.events[-1]["error"]["code"] == "engine_broke"
        assert (told.is_over, told.is_whole) == (True, False)
        assert not here.big.seen

    on_line(test)


def test_when_nobody_can_the_routes_own_error_is_told() -> None:
    async def test(here: Line) -> None:
        here.ours.always, here.big.always, here.openai.always = "busy", "error", "busy"
        refusal = await here.refused(ALL)
        assert (refusal.status, refusal.code, refusal.retry_after) == (429, "engine_busy", 7)
        here.ours.always = "error"
        refusal = await here.refused(ALL)
        assert (refusal.status, refusal.code) == (503, "engine_away")

    on_line(test)


def test_the_next_one_is_asked_at_once_while_an_engine_is_away() -> None:
    async def test(here: Line) -> None:
        routes = here.routes()
        here.board.put("engine", Routes(away={"tickets": Away("it restarts")}, engines=routes.engines))
        began = time.monotonic()
        told = await here.ask(WITH_BIG)
        assert told.headers["x-ft-adapter"] == "engine:big/big-70b"
        assert time.monotonic() - began < 0.25
        assert "x-ft-held" not in told.headers

    on_line(test)


def test_what_is_away_is_waited_for_when_nobody_else_answers() -> None:
    async def test(here: Line) -> None:
        here.big.always = "error"
        engines = here.routes().engines
        here.board.put("engine", Routes(away={"tickets": Away("it restarts")}, engines=engines))
        asking = asyncio.create_task(here.ask(WITH_BIG))
        await asyncio.sleep(0.2)
        here.board.put("engine", here.routes())
        told = await asking
        assert told.headers["x-ft-adapter"] == "tickets@2"
        assert "x-ft-fallback" not in told.headers
        assert float(told.headers["x-ft-held"]) > 0

    on_line(test, hold_seconds=2.0)


def test_what_says_so_is_waited_for_longer_and_a_fallback_is_asked_all_the_same() -> None:
    """A version is loaded behind seven others: one in twenty-five callers was told to come again after five seconds."""

    async def test(here: Line) -> None:
        engines = here.routes().engines
        here.board.put("engine", Routes(away={"tickets": Away("it is being loaded", patience=8.0)}, engines=engines))
        assert (await here.ask(WITH_BIG)).headers["x-ft-adapter"] == "engine:big/big-70b"
        asking = asyncio.create_task(here.ask())
        await asyncio.sleep(1.0)
        assert not asking.done()
        here.board.put("engine", here.routes())
        assert (await asking).headers["x-ft-adapter"] == "tickets@2"
        here.board.put("engine", Routes(away={"tickets": Away("it is being loaded", patience=0.6)}, engines=engines))
        began = time.monotonic()
        assert (await here.refused()).code == "engine_away"
        assert 0.5 < time.monotonic() - began < 7

    on_line(test)


def test_an_engine_on_demand_is_wanted_and_waited_for_before_anybody_else() -> None:
    async def test(here: Line) -> None:
        wanted: list[float] = []
        coming = Away("it starts", seconds=2.0, want=lambda: wanted.append(time.monotonic()))
        here.board.put("engine", Routes(engines={"ours": coming, "big": here.routes().engines["big"]}))
        asking = asyncio.create_task(here.ask({"engine": "ours", "fallbacks": [{"engine": "big"}]}))
        await asyncio.sleep(0.4)
        assert wanted
        assert not here.big.seen
        here.board.put("engine", here.routes())
        told = await asking
        assert told.headers["x-ft-adapter"] == "engine:ours/base"
        assert float(told.headers["x-ft-held"]) >= 0.3
        coming = Away("it starts", seconds=0.3, hold=False)
        here.board.put("engine", Routes(engines={"ours": coming, "big": here.routes().engines["big"]}))
        told = await here.ask({"engine": "ours", "fallbacks": [{"engine": "big"}]})
        assert told.headers["x-ft-adapter"] == "engine:big/big-70b"

    on_line(test)


def test_what_is_found_away_is_wanted_also_where_another_answers() -> None:
    async def test(here: Line) -> None:
        wanted: list[str] = []
        away = Away("it is not loaded", want=lambda: wanted.append("tickets"))
        here.board.put("engine", Routes(away={"tickets": away}, engines=here.routes().engines))
        assert (await here.ask(WITH_BIG)).headers["x-ft-fallback"] == "1"
        assert wanted == ["tickets"]

    on_line(test)


def test_a_request_that_waited_in_vain_is_told_how_far_its_engine_is() -> None:
    async def test(here: Line) -> None:
        here.board.demand.starts("ours")
        here.board.put("engine", Routes(engines={"ours": Away("it starts", seconds=0.2, hold=False, engine="ours")}))
        told, headers = Told(), [(b"x-request-id", b"r")]
        terms = RouteTerms.model_validate({"engine": "ours"})
        with pytest.raises(Refusal) as caught:
            await here.chain.answer(Ask(CHAT, {}, "t", "t", terms, False, headers, user="s"), told.send)
        assert (caught.value.status, caught.value.code) == (503, "engine_away")
        told_by_name = dict(headers)[b"x-ft-engine"]
        assert told_by_name.startswith(b"starting; eta=")
        assert caught.value.retry_after == int(told_by_name.rpartition(b"=")[2]) > 60, "not sooner than it can be up"

    on_line(test)


def test_requests_that_could_go_to_an_engine_are_counted_for_it() -> None:
    async def test(here: Line) -> None:
        volume = {"requests": 2, "within": "5m", "keywords": ["contract"]}
        here.board.demand.engines = {
            "slow": EngineTerms.model_validate({"base": "x/y", "start": "demand", "volume": volume})
        }
        engines = here.routes().engines
        here.board.put("engine", Routes(away={"tickets": Away("it is off", engine="slow")}, engines=engines))
        await here.ask(WITH_BIG, messages=[{"role": "user", "content": "my contract"}])
        await here.ask(WITH_BIG)
        assert here.board.demand.wanted_since("slow") is None
        await here.ask(WITH_BIG, messages=[{"role": "user", "content": "That Contract again"}])
        assert here.board.demand.wanted_since("slow") is not None
        assert len(here.big.seen) == 3
        named = {"model": "tickets", "fallbacks": [{"engine": "big"}, {"engine": "named"}]}
        here.board.demand.engines = {
            "named": EngineTerms.model_validate({"base": "x/y", "start": "demand", "volume": volume})
        }
        for _ in range(2):
            await here.ask(named, messages=[{"role": "user", "content": "my contract"}])
        assert here.board.demand.wanted_since("named") is not None

    on_line(test)


def test_a_full_route_begins_with_its_fallbacks() -> None:
    async def test(here: Line) -> None:
        told = Told()
        terms = RouteTerms.model_validate(WITH_BIG)
        ask = Ask(CHAT, {"model": "tickets"}, "tickets", "tickets", terms, False, [], user="s")
        await here.chain.answer(ask, told.send, skip=1)
        assert told.headers["x-ft-adapter"] == "engine:big/big-70b"
        assert not here.ours.seen
        ask.terms = RouteTerms(model="tickets")
        with pytest.raises(Refusal) as caught:
            await here.chain.answer(ask, told.send, skip=1)
        assert caught.value.status == 429

    on_line(test)


def test_a_route_without_a_place_left_has_its_fallbacks() -> None:
    async def test(here: Line) -> None:
        gateway = Gateway(here.board, "internal-key", chain=here.chain)
        terms = RouteTerms.model_validate({**WITH_BIG, "limits": {"concurrent": 1, "queue": 0}})
        here.ours.faults = ["hang"]

        async def ask(told: Told, terms: RouteTerms) -> None:
            asked = Ask(
                CHAT, {"model": "tickets"}, "tickets", "tickets", terms, False, [(b"x-request-id", b"r")], user="s"
            )
            await gateway._counted(asked, told.send)

        first, second = Told(), Told()
        asking = asyncio.create_task(ask(first, terms))
        async with asyncio.timeout(3):
            while not here.ours.seen:
                await asyncio.sleep(0.01)
        await ask(second, terms)
        assert second.headers["x-ft-adapter"] == "engine:big/big-70b"
        with pytest.raises(Refusal) as caught:
            await ask(Told(), terms.model_copy(update={"fallbacks": []}))
        assert caught.value.status == 429
        here.ours.gate.set()
        await asking
        assert first.headers["x-ft-adapter"] == "tickets@2"

    on_line(test)


def test_a_breaker_turns_to_the_fallback_without_asking_and_back() -> None:
    async def test(here: Line) -> None:
        here.ours.always = "error"
        for _ in range(6):
            assert (await here.ask(WITH_BIG)).headers["x-ft-fallback"] == "1"
        assert len(here.ours.seen) == 4
        assert here.counted.breakers == [("ours", "open")]
        here.ours.always = None
        await asyncio.sleep(0.5)
        assert (await here.ask(WITH_BIG)).headers["x-ft-adapter"] == "tickets@2"
        assert here.counted.breakers[1:] == [("ours", "half-open"), ("ours", "closed")]

    on_line(test, bounds=Bounds(least=4, cool_down=0.4, jitter=0.0))


def test_a_caller_that_leaves_blames_nobody_and_frees_the_trial() -> None:
    async def test(here: Line) -> None:
        here.ours.always = "error"
        await here.ask(WITH_BIG)
        await here.ask(WITH_BIG)
        await asyncio.sleep(0.25)
        here.ours.always = "hang"
        trial = asyncio.create_task(here.ask(WITH_BIG))
        await asyncio.sleep(0.1)
        trial.cancel()
        with suppress(asyncio.CancelledError):
            await trial
        here.ours.always = None
        assert (await here.ask(WITH_BIG)).headers["x-ft-adapter"] == "tickets@2"

    on_line(test, bounds=Bounds(least=2, cool_down=0.2, jitter=0.0))


def test_an_engine_that_only_sometimes_fails_is_asked_when_there_is_no_other() -> None:
    async def test(here: Line) -> None:
        await here.ask()
        here.ours.faults = ["error", "error", "error", "error"]
        await here.refused()
        await here.refused()
        assert here.counted.breakers == [("ours", "open")]
        assert (await here.ask()).status == 200

    on_line(test, bounds=Bounds(least=4, cool_down=60))


def test_an_engine_that_always_fails_is_left_alone() -> None:
    async def test(here: Line) -> None:
        here.ours.always = "error"
        for _ in range(2):
            await here.refused()
        asked = len(here.ours.seen)
        began = time.monotonic()
        refusal = await here.refused()
        assert (refusal.status, refusal.code) == (503, "engine_away")
        assert refusal.retry_after
        assert refusal.retry_after > 40
        assert time.monotonic() - began < 0.2
        assert len(here.ours.seen) == asked

    on_line(test, bounds=Bounds(least=4, cool_down=60))


def test_nothing_of_a_local_route_leaves() -> None:
    terms = {"model": "tickets", "local_only": True, "fallbacks": [{"engine": "big"}]}

    async def test(here: Line) -> None:
        # A recipe that says `local` of an address elsewhere does not get here; the upstream itself is what is asked.
        here.ours.always = "error"
        refusal = await here.refused(terms)
        assert refusal.status == 503
        assert not here.big.seen
        cloud = RemoteEngine("cloud", here.openai.url, local=False)
        here.board.put("endpoints", Routes(public={"tickets": Route("tickets@2", cloud)}))
        here.board.put("engine", Routes(away={"tickets": Away("it restarts")}))
        assert (await here.ask()).status == 200  # an endpoint answers for ours
        assert len(here.openai.seen) == 1
        refusal = await here.refused(terms)
        assert "restarts" in refusal.message
        here.board.put("engine", Routes())
        refusal = await here.refused(terms)
        assert refusal.code == "local_only"
        stable, new = Route("tickets@2", here.engine), Route("tickets@3", cloud)
        canary = {"tickets": Split(stable, new, 100.0, "salt")}
        here.board.put("engine", Routes(public={"tickets": stable}, splits=canary))
        here.ours.always = None
        assert (await here.ask(terms)).headers["x-ft-adapter"] == "tickets@2"
        assert len(here.openai.seen) == 1
        await cloud.close()

    on_line(test)


@pytest.mark.parametrize(
    ("terms", "default", "first"),
    [
        ({"model": "m"}, "openai", Target("m", None, None, None)),
        ({"model": "m", "openai": "g"}, "local", Target("m", None, None, None)),
        ({"model": "m", "openai": "g"}, "openai", Target(None, None, None, "g")),
        ({"model": "m", "openai": "g", "provider": "local"}, "openai", Target("m", None, None, None)),
        ({"model": "m", "openai": "g", "provider": "openai"}, "local", Target(None, None, None, "g")),
        ({"openai": "g"}, "local", Target(None, None, None, "g")),
        ({"engine": "e", "as": "x"}, "openai", Target(None, "e", "x", None)),
    ],
)
def test_the_provider_decides_the_first_target(terms: dict[str, Any], default: Any, first: Target) -> None:
    assert targets_of(RouteTerms.model_validate(terms), default) == [first]


def test_a_model_goes_to_the_engine_that_its_route_names() -> None:
    async def test(here: Line) -> None:
        here.board.put("other", Routes(public={"tickets": Route("tickets@1", here.far)}))
        told = await here.ask({"model": "tickets", "engine": "other"})
        assert told.headers["x-ft-adapter"] == "tickets@1"
        told = await here.ask({"model": "tickets", "engine": "ours"})
        assert told.headers["x-ft-adapter"] == "tickets@2"

    on_line(test)


def test_what_a_header_cannot_hold_stays_out_of_it() -> None:
    async def test(here: Line) -> None:
        told = await here.ask({"engine": "big", "as": "큰 모델\r\nx-evil: 1"})
        assert told.headers["x-ft-adapter"] == "engine:big/??????x-evil:?1"
        assert here.big.seen[0][1]["model"] == "큰 모델\r\nx-evil: 1"

    on_line(test)


def test_an_unknown_model_can_still_have_a_fallback() -> None:
    async def test(here: Line) -> None:
        told = await here.ask({"model": "letters", "fallbacks": [{"engine": "big"}]})
        assert told.headers["x-ft-fallback"] == "1"
        assert (await here.refused({"model": "ticket"})).code == "model_not_found"
        here.chain.names = lambda: ["tickets"]  # a route of the recipe, whose model has no champion yet
        refusal = await here.refused({"model": "letters"})
        assert (refusal.status, refusal.code) == (404, "model_not_served")
        assert refusal.message == "tickets leads to the model letters, and no version of it answers yet"

    on_line(test)
