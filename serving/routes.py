"""Routes: which public name leads to which adapter version on which engine, right now.

A request looks once, at its start, and stays with what it found. A flip is one assignment in the event loop
that also runs the requests, so a request sees the generation before it or the one after it, nothing between.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

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
class Split:
    """A canary: so many percent of the callers get `new`, always the same ones while the percentage only grows."""

    stable: Route
    new: Route
    percent: float
    salt: str

    def pick(self, subject: str) -> Route:
        """By a stable hash of who asks (a user or a conversation)."""
        hashed = hashlib.sha256(f"{self.salt}:{subject}".encode(errors="replace")).digest()
        return self.new if int.from_bytes(hashed[:8]) / 2**64 * 100 < self.percent else self.stable


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
    # Of the public names, those of which a part of the callers gets another version.
    splits: Mapping[str, Split] = field(default_factory=dict)
    # The engines of the serve recipe by name: their own model, without an adapter.
    engines: Mapping[str, Route | Away] = field(default_factory=dict)

    def find(self, name: str, *, internal: bool) -> Route | Away | None:
        """`internal`: the caller has the internal key, and so may name versions that no gate has passed."""
        found = self.public.get(name) or self.away.get(name)
        return found or (self.internal.get(name) if internal else None)

    def nearest(self, name: str) -> list[str]:
        models = {each for each in self.away if "@" not in each}
        names = sorted({*self.public, *models})
        return difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]


class Board:
    """Holds the routes in force and counts the requests under way on each adapter.

    Each engine puts up its own part; what a caller sees is all of them, an earlier part before a later one.
    """

    def __init__(self, parts: Sequence[str] = ()) -> None:
        """`parts`: their order; those that are not named come behind, as they are put up."""
        self.routes = Routes()
        self.in_flight: Counter[Route] = Counter()
        self._parts: dict[str, Routes] = {name: Routes() for name in parts}
        self._changed = asyncio.Event()

    def put(self, part: str, routes: Routes) -> None:
        """Put an engine's routes in force, atomically, and wake whoever waits for a change; nothing if they are so."""
        if self._parts.get(part) != routes:
            self._parts[part] = routes
            self.routes = replace(merged(list(self._parts.values())), generation=self.routes.generation + 1)
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()

    def part(self, name: str) -> Routes:
        """What was put up under that name."""
        return self._parts.get(name, Routes())

    def drop(self, part: str) -> None:
        self.put(part, Routes())

    async def change(self, seconds: float) -> None:
        """Return at the next flip, or after so many seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), max(seconds, 0.0))

    @contextmanager
    def counted(self, route: Route) -> Iterator[None]:
        """An adapter is not unloaded while a request is inside."""
        self.in_flight[route] += 1
        try:
            yield
        finally:
            self.in_flight[route] -= 1
            if not self.in_flight[route]:
                del self.in_flight[route]

    async def drained(self, engine: Upstream, seconds: float) -> bool:
        """Wait until nothing is under way on that engine; False if something still is after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._busy(engine):
                    await asyncio.sleep(0.05)
        return not self._busy(engine)

    def _busy(self, engine: Upstream) -> bool:
        return any(route.engine is engine for route in self.in_flight)


def merged(parts: Sequence[Routes]) -> Routes:
    """Pure. What one part answers, another's absence or refusal does not hide; of two that answer the first does."""
    routes: dict[str, Any] = {
        name: {key: value for each in reversed(parts) for key, value in getattr(each, name).items()}
        for name in ("public", "internal", "away", "closed", "splits", "engines")
    }
    public, away = routes["public"], routes["away"]
    routes["splits"] = {name: each for name, each in routes["splits"].items() if public.get(name) == each.stable}
    routes["away"] = {name: each for name, each in away.items() if name not in public}
    routes["closed"] = {name: why for name, why in routes["closed"].items() if name not in public and name not in away}
    return Routes(**routes)
