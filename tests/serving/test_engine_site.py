"""What all engines have in common: their routes go when they do, whatever else is away."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from registry.errors import StoreError
from registry.settings import Settings
from serving.engine import Engine
from serving.engine_site import Site, itself
from serving.routes import Away, Board, Route, Routes
from tests.fakes.reconciled import make_site

WHY = Away("its engine is restarting")


def test_the_names_of_an_engine_that_is_away_are_held(tmp_path: Path) -> None:
    async def test() -> None:
        here = make_site(tmp_path)
        for model in ("judged", "new", "other"):
            here.add(model, 1)
        here.promote("judged", 1)
        site = Site(here.project, here.store, Settings(), Board(), lambda: None, unjudged=frozenset({"new"}))
        await site.flip_away("main", here.base, WHY)
        assert set(site.board.routes.away) == {"judged", "judged@1", "new", "new@1"}
        assert set(site.board.routes.closed) == {"other"}
        assert site.board.routes.engines == {"main": WHY}

    asyncio.run(test())


def test_routes_to_a_dead_engine_go_without_the_database_too(tmp_path: Path) -> None:
    async def test() -> None:
        here = make_site(tmp_path)
        site = Site(here.project, here.store, Settings(), Board(), lambda: None)
        async with Engine("http://127.0.0.1:9", "key") as engine:
            up = {name: Route("a@2", engine) for name in ("a", "a@2")}
            site.board.put("main", Routes(public=up, closed={"b": "it has no champion yet"}))
            site.board.put(itself("main"), Routes(engines={"main": Route("base", engine)}))
            with here.store.writing() as connection:
                connection.execute("ALTER TABLE versions RENAME TO gone")
            with pytest.raises(StoreError):
                here.store.read("SELECT model FROM versions")
            await site.flip_away("main", here.base, WHY)
        routes = site.board.routes
        assert (dict(routes.public), dict(routes.away)) == ({}, {"a": WHY, "a@2": WHY})
        assert (routes.engines, dict(routes.closed)) == ({"main": WHY}, {"b": "it has no champion yet"})

    asyncio.run(test())
