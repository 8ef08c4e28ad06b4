"""Routes: which public name leads to which adapter version on which engine, right now.

A request looks once, at its start, and stays with what it found. A flip is one assignment in the event loop
that also runs the requests, so a request sees the generation before it or the one after it, nothing between.
"""

from __future__ import annotations

import asyncio
import difflib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

import aiohttp

from serving.http_messages import Refusal


class Upstream(Protocol):
    """What answers behind the gateway: an engine of this server, or a serverless endpoint.

    Its session carries the upstream's own key; requests go to `url` + /v1/...
    """

    url: str
    session: aiohttp.ClientSession

    async def healthy(self, seconds: float) -> bool:
        """Never raises."""
        ...

    def refusal(self, status: int, first: bytes) -> Refusal | None:
        """What to tell the caller instead of an answer that is not in OpenAI's form, or betrays what lies behind."""
        ...


@dataclass(frozen=True)
class Route:
    """Where a name leads: the adapter (`model@N`, or `base`) as the upstream calls it."""

    adapter: str
    engine: Upstream


@dataclass(frozen=True)
class Away:
    """Why a name that should lead somewhere does not now; `hold`: worth waiting a moment for."""

    reason: str
    retry_after: int = 5
    hold: bool = True


@dataclass(frozen=True)
class Routes:
    """One generation. No name is both in `public` and in `away`."""

    generation: int = 0
    public: Mapping[str, Route] = field(default_factory=dict)
    internal: Mapping[str, Route] = field(default_factory=dict)
    away: Mapping[str, Away] = field(default_factory=dict)
    # Models that exist but are not answered here: why.
    closed: Mapping[str, str] = field(default_factory=dict)
    # Serverless endpoints: they answer where no engine of this server does.
    remote: Mapping[str, Route] = field(default_factory=dict)

    def find(self, name: str, *, internal: bool) -> Route | Away | None:
        """`internal`: the caller has the internal key, and so may name versions that no gate has passed."""
        found = self.public.get(name) or self.remote.get(name) or self.away.get(name)
        return found or (self.internal.get(name) if internal else None)

    def nearest(self, name: str) -> list[str]:
        models = {each for each in self.away if "@" not in each}
        names = sorted({*self.public, *self.remote, *models})
        return difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]


class Board:
    """Holds the routes in force and counts the requests under way on each adapter."""

    def __init__(self) -> None:
        self.routes = Routes()
        self.in_flight: Counter[str] = Counter()
        self._changed = asyncio.Event()

    def flip(self, routes: Routes) -> None:
        """Put new routes in force, atomically, and wake whoever waits for a change. Endpoints stay."""
        self._put(replace(routes, remote=self.routes.remote))

    def lend(self, remote: Mapping[str, Route]) -> None:
        """The endpoints that answer from now on; nothing if they are the same."""
        if remote != self.routes.remote:
            self._put(replace(self.routes, remote=remote))

    def _put(self, routes: Routes) -> None:
        self.routes = replace(routes, generation=self.routes.generation + 1)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def change(self, seconds: float) -> None:
        """Return at the next flip, or after so many seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), max(seconds, 0.0))

    @contextmanager
    def counted(self, route: Route) -> Iterator[None]:
        """An adapter is not unloaded while a request is inside."""
        self.in_flight[route.adapter] += 1
        try:
            yield
        finally:
            self.in_flight[route.adapter] -= 1
            if not self.in_flight[route.adapter]:
                del self.in_flight[route.adapter]

    async def drained(self, seconds: float) -> bool:
        """Wait until nothing is under way; False if something still is after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.in_flight:
                    await asyncio.sleep(0.05)
        return not self.in_flight
