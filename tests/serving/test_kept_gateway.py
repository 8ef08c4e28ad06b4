"""The gateway with what it looks at: what a recipe that comes later changes, and which routes count as up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from registry.project import Project
from registry.serve_recipe import ServeRecipe
from registry.served_routes import publish
from registry.serving_lead import take_lead
from registry.settings import Settings
from registry.store import Store
from serving.engine import Engine
from serving.gateway_only import _published_recipe
from serving.kept_gateway import KeptGateway
from serving.published import write_published
from serving.routes import Away, Board, Route, Routes

CHAT = "/v1/chat/completions"


def recipe_of(**more: Any) -> ServeRecipe:
    engines = {"small": {"base": {"model": "org/small@main"}}, "large": {"base": {"model": "org/large@main"}}}
    return ServeRecipe.model_validate({"kind": "serve", "engines": engines, **more})


@asynccontextmanager
async def kept_gateway(project: Project, store: Store, recipe: ServeRecipe | None = None) -> AsyncIterator[KeptGateway]:
    kept = KeptGateway(project, store, Settings(), Board(), "internal", recipe, "desk-1")
    try:
        yield kept
    finally:
        await kept.close()


async def ask(kept: KeptGateway, **request: Any) -> int:
    """The status of the answer."""
    body = json.dumps({"model": "nobody", "messages": [{"role": "user", "content": "hi"}], **request}).encode()
    said: list[Any] = []
    came = [{"type": "http.request", "body": body}]

    async def receive() -> Any:
        return came.pop() if came else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        said.append(message)

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": [], "client": ("127.0.0.1", 1)}
    await kept.app(scope, receive, send)
    return int(said[0]["status"])


def test_a_recipe_that_comes_later_turns_the_request_log_on_and_off(project: Project, store: Store) -> None:
    async def test() -> None:
        async with kept_gateway(project, store) as kept:
            await ask(kept)
            kept.put(recipe_of(log={"on": True}))
            assert await ask(kept, user="u") == 404
            kept.put(recipe_of(log={"on": True}, limits={"n": 1}))
            await ask(kept)
            kept.put(recipe_of())
            await ask(kept)
        [file] = project.logs.glob("requests*.jsonl")
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert [(each["status"], each["prompt"]) for each in lines] == [(404, "hi")] * 2

    asyncio.run(test())


def test_a_route_is_up_if_anybody_can_answer_it(
    project: Project, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    routes = {
        "alone": {"engine": "small"}, "helped": {"engine": "small", "fallbacks": [{"engine": "large"}]},
        "comes": {"engine": "large"}, "tickets": {"model": "tickets"}, "cloud": {"openai": "gpt-4o-mini"},
    }  # fmt: skip

    async def test() -> None:
        recipe = recipe_of(routes=routes)
        async with kept_gateway(project, store, recipe) as kept, Engine("http://127.0.0.1:9", "key") as engine:
            restarts = Away("its engine is restarting")
            off = Away("it starts when it is wanted", seconds=60, engine="large")
            kept.board.put("engines", Routes(engines={"small": restarts, "large": off}, away={"tickets": restarts}))
            up = {name for name, is_up in kept._answering().items() if is_up}
            assert up == {"helped", "comes"}
            there = Route("tickets@1", engine)
            kept.board.put("engines", Routes(engines={"small": there}, public={"tickets": there}))
            assert {name for name, is_up in kept._answering().items() if is_up} == {"alone", "helped", "tickets"}

    asyncio.run(test())


def test_a_gateway_that_comes_later_has_the_bounds_of_the_published_objectives(project: Project, store: Store) -> None:
    assert _published_recipe(store) is None
    routes = {"tickets": {"model": "tickets", "objectives": {"p95": "770ms"}}}
    publish(
        store, take_lead(store, "desk", 10, alone=True), write_published(Routes(), recipe_of(routes=routes), (), id_of)
    )

    async def test() -> None:
        async with kept_gateway(project, store, _published_recipe(store)) as kept:
            kept.metrics.begin("tickets", "").done(200)
            assert 'le="0.77"' in kept.metrics.text().decode()
            assert kept.board.demand.engines.keys() == {"small", "large"}

    asyncio.run(test())


def id_of(_: object) -> str:
    return "start"
