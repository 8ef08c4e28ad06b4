"""A gateway without an engine: it answers as the leading server says, from the engines of that server.

Several of them may stand behind a load balancer. Each follows by itself (`serving/following.py`); none needs another.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

from pydantic import ValidationError

from registry.errors import RecipeError
from registry.gateways import GatewayRow
from registry.host_name import host_name
from registry.leases import clock
from registry.project import Project
from registry.recipe import expand
from registry.serve_recipe import ServeRecipe
from registry.served_routes import NONE
from registry.settings import Settings
from registry.store import Store, open_store
from serving.engine import Engine
from serving.following import Follower, read
from serving.kept_gateway import ENDPOINTS, KeptGateway
from serving.leased import CUT_OFF, Leased
from serving.listening import calm_collector, http_server, listen, loop_factory, url_of
from serving.outside import REMOTE
from serving.published import Published, PublishedEngine, ended, read_routes
from serving.routes import Away, Board, Route, Routes, Upstream
from serving.server_keys import read_engine_keys, read_keys

# Parts of the board.
LEADER = "leader"
LEASE_STEP_SECONDS = 0.05
# Who still waits asks again.
ASKED_SECONDS = 10.0


def run_gateway(
    project: Project, store: Store, settings: Settings, port: int, say: Callable[[str], None] = lambda _: None
) -> None:
    """Answer until SIGTERM or SIGINT. `say` is given the address. Raises Trouble for a port in use."""
    listening = listen(settings.gateway_host, port, "the gateway", "--port")
    say(url_of(listening))
    calm_collector()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(GatewayOnly(project, store, settings, url_of(listening)).run(listening))


class GatewayOnly:
    """One gateway process: its board, the engines behind it, and what it follows. Made in a running loop or before."""

    def __init__(self, project: Project, store: Store, settings: Settings, url: str) -> None:
        self.project, self.store, self.settings = project, store, settings
        # What is elsewhere is looked at from here: what the leader says of it does not count.
        self.board = Board([REMOTE, LEADER, ENDPOINTS])
        row = GatewayRow(uuid.uuid4().hex, host_name(), url, time.time(), settings.lease_seconds)
        self.follower = Follower(self._opened, row, self.board, self._put, self._wanted, self._show)
        self.kept: KeptGateway | None = None
        self._routes, self._engines = Routes(), dict[tuple[str, str], Engine]()
        self._closing: set[asyncio.Future[None]] = set()

    async def run(self, listening: socket.socket) -> None:
        """Answer and follow until told to end; then what is under way ends, and the last word is that it left."""
        stop = asyncio.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        self.kept = kept = self._kept()
        server = http_server(
            Leased(kept.app, lambda: self.follower.lease.lasts), int(self.settings.drain_seconds), log_level="warning"
        )
        answering, stopping = asyncio.create_task(server.serve(sockets=[listening])), asyncio.create_task(stop.wait())
        following = [asyncio.create_task(each()) for each in (self.follower.run, self._mind_lease, kept.run)]
        try:
            await asyncio.wait({answering, stopping, *following}, return_when=asyncio.FIRST_COMPLETED)
            for over in following:
                if over.done():
                    over.result()
        finally:
            server.should_exit = True
            await asyncio.gather(answering, return_exceptions=True)
            for task in (stopping, *following):
                task.cancel()
            await asyncio.gather(stopping, *following, return_exceptions=True)
            await self.follower.leave()
            await self.close()

    async def close(self) -> None:
        if self.kept:
            await self.kept.close()
        for each in self._engines.values():
            await each.close()

    def _kept(self) -> KeptGateway:
        """The store is another than the follower's, which may be given up. The recipe of now, if there is one: by its
        objectives the bounds of the histograms are made, once; later ones come with the routes."""
        key = self.settings.internal_key or read_keys(self.project).get("internal_key") or secrets.token_urlsafe(32)
        store, name = open_store(self.project), f"{host_name()}-{os.getpid()}"
        return KeptGateway(self.project, store, self.settings, self.board, key, _published_recipe(store), name)

    def _opened(self) -> Store:
        """At first the store that is open already, afterwards a new one: the one before is given up."""
        store, self.store = self.store, None  # type: ignore[assignment]
        return store or open_store(self.project)

    def _put(self, published: Published) -> None:
        recipe = _recipe_of(published)
        if self.kept:
            self.kept.put(recipe)
        upstreams, demand = self._upstreams(published, recipe), self.board.demand
        self._routes = read_routes(published, upstreams, self._want)
        for name in (name for name, each in self._routes.engines.items() if isinstance(each, Route)):
            demand.is_up(name)
        self._show()
        self._close_unused(set(upstreams.values()))

    def _want(self, name: str) -> None:
        """An engine on demand, or a version that made room for others: only the leading server can bring it."""
        if name in self.board.demand.engines:
            self.board.demand.want(name)
        else:
            self.board.want(name)

    def _wanted(self) -> frozenset[str]:
        demand, asked, now = self.board.demand, self.board.asked, time.monotonic()
        for name in [name for name, since in asked.items() if now - since > ASKED_SECONDS or self._is_there(name)]:
            del asked[name]
        return frozenset({name for name in demand.engines if demand.wanted_since(name) is not None} | asked.keys())

    def _is_there(self, name: str) -> bool:
        return name in self._routes.public

    def _upstreams(self, published: Published, recipe: ServeRecipe | None) -> dict[str, Upstream]:
        """One client for each start of an engine; of those without a key none."""
        keys, found = read_engine_keys(self.project), dict[str, Upstream]()
        for url, engine in published.engines.items():
            key = _key_of(url, engine, recipe, keys.get(url) or self.settings.engine_key)
            if key is not None and (url, engine.start) not in self._engines:
                self._engines[url, engine.start] = Engine(url, key, local=engine.local)
            if key is not None:
                found[url] = self._engines[url, engine.start]
        return found

    def _close_unused(self, used: set[Upstream]) -> None:
        asked = {route.engine for route in self.board.in_flight}
        for name, engine in [*self._engines.items()]:
            if engine not in used and engine not in asked:
                closing = asyncio.ensure_future(self._engines.pop(name).close())
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    def _show(self) -> None:
        cut_off = Away(CUT_OFF.message, CUT_OFF.retry_after or 5)
        self.board.put(LEADER, self._routes if self.follower.lease.lasts else ended(self._routes, cut_off))

    async def _mind_lease(self) -> None:
        """A request that waits for its route when the lease ends must not find it afterwards."""
        while True:
            self._show()
            await asyncio.sleep(max(self.follower.lease.end - clock(), LEASE_STEP_SECONDS))


def _published_recipe(store: Store) -> ServeRecipe | None:
    with suppress(ValidationError):  # a newer version's: following says so, again and again
        found = read(store, NONE)
        return _recipe_of(found.published) if found else None
    return None


def _recipe_of(published: Published) -> ServeRecipe | None:
    return ServeRecipe.model_validate(published.recipe) if published.recipe else None


def _key_of(url: str, engine: PublishedEngine, recipe: ServeRecipe | None, ours: str) -> str | None:
    """Ours never goes to an engine that somebody else runs. Pure but for the environment."""
    if not engine.name:
        return ours or None
    terms = recipe.engines.get(engine.name) if recipe else None
    if terms is None or not terms.key:
        return None if terms is None else ""
    try:
        return expand(terms.key, f"engines.{engine.name}.key")
    except RecipeError:  # a variable is not set on this host
        return None
