"""The leading server's side of several gateways: publish what its board shows, and unload nothing that others may ask.

An adapter goes in this order: no published generation leads to it; every gateway that lives has acknowledged such a
generation, with none of its requests to that adapter under way; then it is unloaded. A gateway that is silent holds it
up until its lease has ended, by this process's clock.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakKeyDictionary

from registry.errors import StoreError
from registry.gateways import GatewayRow, Ref, Watch, forget_silent, gateways
from registry.leases import RENEWED_AFTER, clock
from registry.serve_recipe import ServeRecipe
from registry.served_routes import publish
from registry.serving_lead import Lead, LeadLost, release_lead, renew_lead
from registry.store import Store
from serving.published import ended, leads_to, refs, write_published
from serving.routes import Away, Board, Route, Upstream

DRAIN_STEP_SECONDS = 0.05
AGAIN_SECONDS = 0.5


class Gone:
    """Since which generation nothing published leads to an adapter. Pure."""

    def __init__(self) -> None:
        self._now: frozenset[Ref] = frozenset()
        self._since: dict[Ref, int] = {}
        self._first = 0

    def begin(self, refs: frozenset[Ref]) -> None:
        """A generation with these is about to be written. Of a write that fails nobody knows whether it was done."""
        self._now |= refs

    def done(self, generation: int, refs: frozenset[Ref]) -> None:
        """It was written."""
        self._first = self._first or generation
        self._since |= dict.fromkeys(self._now - refs, generation)
        self._now = refs

    def since(self, ref: Ref) -> int | None:
        """None: something may lead there still. What this leader never published, none of its generations has."""
        return None if ref in self._now or not self._first else self._since.get(ref, self._first)

    def engine_since(self, url: str) -> int | None:
        """The same of every adapter of the engine at that address."""
        if any(each == url for _, each in self._now) or not self._first:
            return None
        return max((since for (_, each), since in self._since.items() if each == url), default=self._first)


class Publisher:
    """Made with the lead. `run` for as long as the server runs; it ends by LeadLost alone.

    `recipe` goes with the routes; whoever sets another one calls `publish`. `want` is called with the name of an engine
    that requests at another gateway wait for, again and again while they do.
    """

    def __init__(
        self,
        store: Store,
        lead: Lead,
        board: Board,
        recipe: ServeRecipe | None = None,
        want: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._want, self._last_used = want, dict[str, float]()
        self.store, self.lead, self.board, self.recipe = store, lead, board, recipe
        self.generation = 0
        self._lease_end = clock() + lead.term
        self._watch = Watch()
        self._lock = asyncio.Lock()
        self._body, self._gone = "", Gone()
        self._retiring: set[Route] = set()
        self._starts: WeakKeyDictionary[Upstream, str] = WeakKeyDictionary()
        self._ending: Away | None = None

    @property
    def leads(self) -> bool:
        """Can no other server have taken the lead yet?"""
        return clock() < self._lease_end

    async def run(self) -> None:
        """Publish each flip as it comes, and keep the lead. Raises LeadLost."""
        due = clock()
        while True:
            shown = self.board.routes
            try:
                await self.publish()
                if clock() >= due:
                    await self._renew()
                    due = clock() + self.lead.term * RENEWED_AFTER
            except StoreError as error:
                print(f"the routes cannot be published: {error.what}", flush=True)
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            if self.board.routes is shown:
                await self.board.change(due - clock())

    async def publish(self) -> int:
        """Put what the board shows in force for all gateways; the generation. Raises LeadLost, StoreError."""
        async with self._lock:
            routes = ended(self.board.routes, self._ending) if self._ending else self.board.routes
            self._retiring &= leads_to(routes) - leads_to(routes, internal=False)
            body = write_published(routes, self.recipe, self._retiring, self._start_of)
            if body != self._body:
                now = refs(leads_to(routes) - self._retiring)
                self._body = ""
                self._gone.begin(now)
                self.generation = await asyncio.to_thread(publish, self.store, self.lead, body)
                self._gone.done(self.generation, now)
                self._body = body
            return self.generation

    async def may_unload(self, engine: Upstream, adapter: str) -> bool:
        """Does no other gateway ask for it any more? This server's own requests are its board's business.

        The first question takes the adapter from the internal key too, so a later one gets the yes.
        """
        route = Route(adapter, engine)
        if route in leads_to(self.board.routes, internal=False):
            return False
        self._retiring.add(route)
        await self.publish()
        ref = (adapter, engine.url)
        since = self._gone.since(ref)
        living = await self._living()
        return since is not None and self.leads and all(each.asks_no_more(ref, since) for each in living)

    def last_used(self, engine: Upstream) -> float:
        """When another gateway was last heard to ask that engine (time.monotonic); 0.0 if never."""
        return self._last_used.get(engine.url, 0.0)

    async def drained(self, engine: Upstream, seconds: float) -> bool:
        """Wait until nothing is under way on that engine, from here or any gateway; False if it still is."""
        deadline = time.monotonic() + seconds
        done = await self.board.drained(engine, seconds)
        while done and not await self._left_alone(engine):
            await asyncio.sleep(DRAIN_STEP_SECONDS)
            done = time.monotonic() < deadline
        return done

    async def close(self, seconds: float) -> None:
        """The server is about to end: say so to all gateways, wait for what they have under way, and let go of the
        lead. Never raises."""
        self._ending = Away("the server is stopping")
        deadline = time.monotonic() + seconds
        with suppress(StoreError, LeadLost):
            while not await self._all_alone() and time.monotonic() < deadline:
                await asyncio.sleep(DRAIN_STEP_SECONDS)
        with suppress(StoreError):
            await asyncio.to_thread(release_lead, self.store, self.lead)

    async def _renew(self) -> None:
        began = clock()
        await asyncio.to_thread(renew_lead, self.store, self.lead)
        self._lease_end = began + self.lead.term
        rows = await asyncio.to_thread(gateways, self.store)
        for row in self._watch.living(rows):
            self._last_used |= dict.fromkeys(row.used, time.monotonic())
            self.board.used |= dict.fromkeys(row.used, time.monotonic())
            for name in row.wanted:
                self._want(name)
                away = self.board.routes.away.get(name)
                if away and away.want:
                    away.want()
        await asyncio.to_thread(forget_silent, self.store, self._watch, rows)

    async def _living(self) -> list[GatewayRow]:
        return self._watch.living(await asyncio.to_thread(gateways, self.store))

    async def _left_alone(self, engine: Upstream) -> bool:
        await self.publish()
        left = self._gone.engine_since(engine.url)
        return left is not None and all(
            each.acknowledged >= left and all(url != engine.url for _, url in each.in_flight)
            for each in await self._living()
        )

    async def _all_alone(self) -> bool:
        generation = await self.publish()
        return all(each.acknowledged >= generation and not each.in_flight for each in await self._living())

    def _start_of(self, engine: Upstream) -> str:
        return self._starts.setdefault(engine, secrets.token_hex(8))
