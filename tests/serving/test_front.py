"""The gateway's front over real HTTP: who may ask, what, where it leads, in which turn, and what is said of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from registry.api_keys import add_key
from registry.events import Event, read
from registry.serve_recipe import ServeRecipe
from registry.store import Store
from serving.callers import Callers
from serving.gateway import ANSWERS, Hooks
from serving.inbox import Inbox
from serving.metrics import Metrics
from serving.policy import Policy
from serving.routes import Away, Routes, Split
from tests.serving.test_gateway import CHAT, KEY, Front, error_of, in_front

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
REFUND = {"messages": [{"role": "user", "content": "환불은요?"}]}


def policy(**given: Any) -> Policy:
    routes = {
        "support": {"model": "tickets", "limits": {"max_tokens": 50, "concurrent": 1, "queue": 1, "wait": "1s"}},
        "small": {"model": "tickets", "limits": {"body_mb": 0.001}},
        "big": {"engine": "main"},
    }
    rules = [{"when": {"keywords": "환불"}, "route": "support"}, {"when": {"header": {"x-to": "big"}}, "route": "big"}]
    recipe = {"kind": "serve", "name": "desk", "engines": {"main": {"base": {"model": "m"}}}, "routes": routes}
    return Policy.of(ServeRecipe(**{**recipe, "rules": rules, **given}))


def callers(store: Store, **keys: dict[str, Any]) -> tuple[Callers, dict[str, str]]:
    """With these keys; name -> key."""
    made = {
        name: add_key(store, name, **{"routes": None, "rate": None, "by_whom": "test", **terms})
        for name, terms in keys.items()
    }
    found = Callers(KEY)
    found.refresh(store)
    return found, made


def with_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def answered(here: Front, body: Any, path: str = CHAT, **headers: str) -> tuple[int, str, Any]:
    """(status, the route or the error's code, body)."""
    status, got, text = await here.post(body, path, **headers)
    return status, got.get("x-ft-route", "") if status == 200 else error_of(text)["code"], json.loads(text)


def test_a_rule_leads_a_request_and_names_it() -> None:
    async def test(here: Front) -> None:
        assert (await answered(here, {"model": "auto", **REFUND}))[:2] == (200, "support")
        assert here.canned.seen[-1][1]["model"] == "tickets@2"
        assert here.canned.seen[-1][1]["max_tokens"] == 50
        assert (await answered(here, {"model": "tickets", **REFUND}))[:2] == (200, "tickets")
        assert "max_tokens" not in here.canned.seen[-1][1]
        assert (await answered(here, {"model": "auto", **HELLO}))[:2] == (404, "model_not_found")

    in_front(test, policy=policy())


def test_another_policy_is_in_force_at_once() -> None:
    async def test(here: Front) -> None:
        assert (await answered(here, {"model": "support", **HELLO}))[0] == 404
        here.gateway.policy = policy()
        assert (await answered(here, {"model": "support", **HELLO}))[:2] == (200, "support")
        here.gateway.policy = policy(models=False)
        assert (await answered(here, {"model": "tickets", **HELLO}))[0] == 404

    in_front(test)


@pytest.mark.parametrize(
    ("model", "header", "status", "version"),
    [
        ("support", "1", 200, "tickets@1"),
        ("support@1", "", 200, "tickets@1"),
        ("support@3", "", 404, ""),
        ("support", "9", 404, ""),
        ("support@", "", 404, ""),
        ("support", "1\t", 200, "tickets@1"),
        ("support", "é", 404, ""),
        ("big", "1", 404, ""),
        ("big@1", "", 404, ""),
        ("tickets@2", "1", 200, "tickets@2"),
    ],
)
def test_a_version_by_its_number(model: str, header: str, status: int, version: str) -> None:
    async def test(here: Front) -> None:
        got, headers, _ = await here.post({"model": model, **HELLO}, **({"X-FT-Version": header} if header else {}))
        assert (got, headers.get("x-ft-adapter", "")) == (status, version)

    in_front(test, policy=policy())


def test_limits_are_those_of_the_route() -> None:
    async def test(here: Front) -> None:
        over = {"model": "support", "max_tokens": 51, **HELLO}
        assert (await answered(here, over))[:2] == (400, "limit_exceeded")
        assert (await answered(here, {**over, "model": "tickets"}))[0] == 200
        long = {"messages": [{"role": "user", "content": "x" * 2000}]}
        assert (await answered(here, {"model": "small", **long}))[:2] == (413, "request_too_large")
        assert (await answered(here, {"model": "support", **long}))[0] == 200
        assert (await answered(here, {"model": "tickets", "prompt": ["a"] * 99}, "/v1/completions"))[0] == 400

    in_front(test, policy=policy())


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tickets", "temperature": NaN}',
        b'{"model": "tickets", "x": 1e999}',
        b'{"model": "tickets", "user": "\\ud800"}',
        b'{"model": "tickets", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"model": "tickets", "x": ' + b"9" * 5000 + b"}",
        '{"model": "tickets"}'.encode("utf-16"),
    ],
)
def test_what_an_engine_could_not_read_is_refused_here(body: bytes) -> None:
    async def test(here: Front) -> None:
        assert (await answered(here, body))[:2] == (400, "invalid_json")
        assert not here.canned.seen

    in_front(test)


def test_a_key_hears_of_no_names_beside_its_own(store: Store) -> None:
    known, keys = callers(store, shop={"routes": ("tickts", "support")}, all={})

    async def test(here: Front) -> None:
        for name, near in (("shop", "there is: support"), ("all", "there is: tickets, tickets@2, tickets@1")):
            status, code, said = await answered(here, {"model": "tickts", **HELLO}, **with_key(keys[name]))
            assert (status, code) == (404, "model_not_found")
            assert said["error"]["message"].endswith(near)

    in_front(test, callers=known, policy=policy())


def test_a_key_asks_what_it_may(store: Store) -> None:
    known, keys = callers(store, shop={"routes": ("support",)}, all={})

    async def test(here: Front) -> None:
        shop, everything = with_key(keys["shop"]), with_key(keys["all"])
        for headers in ({}, with_key("ft-wrong"), {"Authorization": keys["shop"]}):
            assert (await answered(here, {"model": "support", **HELLO}, **headers))[:2] == (401, "invalid_api_key")
        assert (await answered(here, {"model": "support", **HELLO}, **shop))[0] == 200
        assert (await answered(here, {"model": "auto", **REFUND}, **shop))[:2] == (200, "support")
        for name in ("tickets", "tickets@1", "letters", "no-such"):
            status, code, said = await answered(here, {"model": name, **HELLO}, **shop)
            assert (status, code) == (403, "model_not_allowed")
            assert "may ask: support" in said["error"]["message"]
        assert (await answered(here, {"model": "auto", **HELLO, "x": 1}, **shop, **{"X-To": "big"}))[0] == 403
        assert (await answered(here, {"model": "tickets", **HELLO}, **everything))[0] == 200
        assert (await answered(here, {"model": "tickets@3", **HELLO}, **everything))[0] == 404
        assert (await answered(here, {"model": "tickets@3", **HELLO}, **with_key(KEY)))[0] == 200
        assert "ft-" not in str(here.canned.seen)
        async with here.session.get(here.url + "/v1/models", headers=shop) as got:
            assert [each["id"] for each in (await got.json())["data"]] == ["support"]
        async with here.session.get(here.url + "/v1/models", headers=everything) as got:
            assert {"auto", "support", "tickets", "big"} <= {each["id"] for each in (await got.json())["data"]}
        async with here.session.get(here.url + "/v1/models") as got:
            assert got.status == 401

    in_front(test, policy=policy(), callers=known)


def test_a_key_asks_as_often_as_it_may(store: Store) -> None:
    known, keys = callers(store, shop={"rate": (2, 60.0)}, all={})

    async def test(here: Front) -> None:
        got = [await here.post({"model": "tickets", **HELLO}, **with_key(keys["shop"])) for _ in range(3)]
        assert [each[0] for each in got] == [200, 200, 429]
        assert 1 <= int(got[2][1]["retry-after"]) <= 30
        assert (await answered(here, {"model": "tickets", **HELLO}, **with_key(keys["all"])))[0] == 200

    in_front(test, callers=known)


def test_a_recipe_that_wants_keys_gets_them() -> None:
    async def test(here: Front) -> None:
        assert (await answered(here, {"model": "tickets", **HELLO}))[0] == 401
        assert (await answered(here, {"model": "tickets", **HELLO}, **with_key(KEY)))[0] == 200
        async with here.session.get(here.url + "/health") as got:
            assert got.status == 200

    in_front(test, policy=policy(keys="required"))


def test_a_gateway_whose_engines_are_all_elsewhere_is_well_while_one_of_them_answers() -> None:
    async def test(here: Front) -> None:
        found = []
        for main in (here.routes().public["tickets"], Away("it does not answer")):
            here.board.put("engine", Routes(engines={"main": main}))
            async with here.session.get(here.url + "/health") as got:
                found.append(got.status)
        assert found == [200, 503]

    in_front(test, policy=policy())


def test_a_full_route_says_when_to_come_again_and_a_caller_that_goes_frees_its_place() -> None:
    async def test(here: Front) -> None:
        here.canned.faults = ["stall"]
        stream = {"model": "support", "stream": True, **HELLO}
        async with here.session.post(here.url + CHAT, json=stream) as first:
            await first.content.readany()
            gone = asyncio.create_task(here.post(stream))
            await asyncio.sleep(0.1)
            status, headers, text = await here.post(stream)
            assert (status, error_of(text)["code"]) == (429, "queue_full")
            assert int(headers["retry-after"]) >= 1
            assert (await here.post({"model": "tickets", **HELLO}))[0] == 200  # another route has its own places
            gone.cancel()
            await asyncio.sleep(0.1)
            waits = asyncio.create_task(here.post(stream))
            await asyncio.sleep(0.1)
            assert not waits.done()
            here.canned.gate.set()
            await first.content.read()
            assert (await waits)[0] == 200
        async with asyncio.timeout(2):
            while here.gateway.room.requests or here.gateway.room.bytes:
                await asyncio.sleep(0.01)

    in_front(test, policy=policy())


def test_who_waits_too_long_is_told(store: Store) -> None:
    async def test(here: Front) -> None:
        here.canned.faults = ["stall"]
        stream = {"model": "support", "stream": True, **HELLO}
        async with here.session.post(here.url + CHAT, json=stream) as first:
            await first.content.readany()
            status, headers, text = await here.post(stream)
            assert (status, error_of(text)["code"], "retry-after" in headers) == (429, "queue_full", True)

    in_front(test, policy=policy())


def test_a_defect_is_an_error_in_openais_form(capsys: pytest.CaptureFixture[str]) -> None:
    async def test(here: Front) -> None:
        here.gateway.policy = None  # type: ignore[assignment]
        status, headers, text = await here.post({"model": "tickets", **HELLO}, **{"X-Request-Id": "r-1"})
        assert (status, error_of(text)["code"], headers["x-request-id"]) == (500, "defect", "r-1")
        assert "NoneType" not in text

    in_front(test)
    assert "request r-1: Traceback" in capsys.readouterr().out


def test_strangers_hear_little(store: Store) -> None:
    known, _ = callers(store, shop={})

    async def test(here: Front) -> None:
        proxied = {"X-Forwarded-For": "203.0.113.9"}
        async with here.session.get(here.url + "/health", headers=proxied) as got:
            assert set(await got.json()) == {"status", "generation"}
        async with here.session.get(here.url + "/metrics", headers=proxied) as got:
            assert got.status in (401, 404)

    in_front(test, callers=known)


def test_feedback_by_the_request_alone(store: Store) -> None:
    known, keys = callers(store, shop={"routes": ("support",)}, other={"routes": ("big",)})
    inbox = Inbox(store)

    async def test(here: Front) -> None:
        shop, other = with_key(keys["shop"]), with_key(keys["other"])

        async def say(status: int, code: str = "", headers: dict[str, str] = shop, **data: Any) -> None:
            got, said, _ = await answered(here, data, "/v1/feedback", **headers, **{"Content-Type": "application/json"})
            assert (got, said) == (status, code)

        assert (await here.post({"model": "support", **HELLO}, **shop, **{"X-Request-Id": "r-1"}))[0] == 200
        await say(200, request="r-1", rating=1, id="once")
        await say(200, request="r-1", rating=1, id="once")
        await say(200, adapter="tickets@1", correction="안녕하세요", tags=["tone"])
        await say(404, "unknown_request", request="r-9", rating=1)
        await say(404, "unknown_request", other, request="r-1", rating=1)
        await say(403, "model_not_allowed", other, adapter="tickets@2", request="r-1", rating=1)
        await say(401, "invalid_api_key", {}, request="r-1", rating=1)
        await say(400, "invalid_event", request="r-1")
        await say(400, "invalid_event", adapter="base", rating=1)
        await say(400, "invalid_event", request="r-1", rating="good", stars=5)
        assert (await here.post(b"rating=1", "/v1/feedback", **shop, **{"Content-Type": "text/plain"}))[0] in (400, 415)

    in_front(test, policy=policy(), callers=known, hooks=Hooks(append=inbox.append))
    inbox.close()
    found = read(store, type_="feedback.received")
    assert [(each.subject, each.data.get("request"), each.id == "once") for each in found] == [
        ("tickets@2", "r-1", True), ("tickets@1", None, False)
    ]  # fmt: skip


def test_feedback_that_cannot_be_stored_is_not_lost_in_silence() -> None:
    async def later(_: Sequence[Event]) -> list[bool]:
        from serving.http_messages import Refusal

        raise Refusal(503, "the store is full", "store_away", retry_after=5)

    async def test(here: Front) -> None:
        body, kind = {"adapter": "tickets@2", "rating": 1}, {"Content-Type": "application/json"}
        status, headers, _ = await here.post(body, "/v1/feedback", **kind)
        assert (status, headers["retry-after"]) == (503, "5")
        here.gateway.hooks.append = None
        assert (await here.post(body, "/v1/feedback", **kind))[0] == 503

    in_front(test, hooks=Hooks(append=later))


def test_a_route_whose_name_is_a_models_too_wins() -> None:
    async def test(here: Front) -> None:
        here.board.put("engine", Routes(public={"support": here.routes().public["tickets@1"], **here.routes().public}))
        status, headers, _ = await here.post({"model": "support", **HELLO})
        assert (status, headers["x-ft-adapter"]) == (200, "tickets@2")

    in_front(test, policy=policy())


@pytest.mark.parametrize("by", ["user", "conversation", "request"])
def test_who_stays_with_one_version_of_a_canary_is_what_its_rollout_says(by: str) -> None:
    async def test(here: Front) -> None:
        routes = here.routes()
        old, new = routes.public["tickets"], routes.public["tickets@1"]
        here.board.put("engine", replace(routes, splits={"tickets": Split(old, new, 50.0, "salt", by)}))

        async def versions(*bodies: dict[str, Any], conversation: str = "") -> set[str]:
            headers = {"X-FT-Conversation": conversation} if conversation else {}
            got = [await here.post({"model": "tickets", **HELLO, **body}, **headers) for body in bodies for _ in "123"]
            return {each[1]["x-ft-adapter"] for each in got}

        def talk(first: str, *more: str) -> dict[str, Any]:
            said = [{"role": "user", "content": each} for each in (first, *more)]
            return {"messages": [{"role": "system", "content": "be kind"}, *said]}

        users = [await versions({"user": f"u-{n}"}, {"user": f"u-{n}", **talk("else")}) for n in range(8)]
        told = [await versions({"user": "u"}, conversation=f"c-{n}") for n in range(8)]
        talks = [await versions(talk(f"q-{n}"), talk(f"q-{n}", "go on")) for n in range(8)]
        both = {"tickets@1", "tickets@2"}
        assert all(len(each) == 1 for each in users) == (by == "user")
        assert all(len(each) == 1 for each in told) == (by != "request")
        assert (set().union(*told) == both) == (by != "user")
        assert all(len(each) == 1 for each in talks) == (by == "conversation")
        assert set().union(*users) == set().union(*talks) == both

    in_front(test)


def test_each_request_is_counted_once_whatever_becomes_of_it() -> None:
    ended: list[tuple[str, str]] = []
    metrics = Metrics(["tickets", "support"], ["internal"])
    hooks = Hooks(metrics, log=lambda ask, going: ended.append((ask.route, going.adapter)))

    async def test(here: Front) -> None:
        await here.post({"model": "tickets", **HELLO})
        await here.post({"model": "ticket", **HELLO}, **with_key(KEY))
        here.canned.faults = ["stall"]
        stream = {"model": "support", "stream": True, **HELLO}
        async with here.session.post(here.url + CHAT, json=stream) as first:
            await first.content.readany()
        first.close()
        async with asyncio.timeout(3):
            while len(ended) < 3:
                await asyncio.sleep(0.02)
        assert ended == [("tickets", "tickets@2"), ("ticket", ""), ("support", "tickets@2")]
        assert (await here.session.get(here.url + "/metrics", headers={"X-Forwarded-For": "1.2.3.4"})).status == 403
        passed_on = {"Via": "1.1 proxy", **with_key(KEY)}
        async with here.session.get(here.url + "/metrics", headers=passed_on) as got:
            assert got.status == 200
        async with here.session.get(here.url + "/metrics") as got:
            text = await got.text()
        assert text.count("ft_requests_under_way{") == 3
        assert all(line.endswith(" 0.0") for line in text.splitlines() if line.startswith("ft_requests_under_way{"))

    in_front(test, policy=policy(), hooks=hooks)


def test_the_surface_is_described() -> None:
    async def test(here: Front) -> None:
        async with here.session.get(here.url + "/openapi.json") as got:
            described = await got.json()
        assert set(described["paths"]) == set(ANSWERS)

    in_front(test)
