"""Routes: which public name leads to which adapter version on which engine, right now.

A request looks once, at its start, and stays with what it found. A flip is one assignment in the event loop
that also runs the requests, so a request sees the generation before it or the one after it, nothing between.
"""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import aiohttp

from serving.demand import Demand
from serving.http_messages import Refusal
from serving.rollout_watch import ArmCounts


class Upstream(Protocol):
    """What answers behind the gateway: an engine of this server, or a serverless endpoint.

    Its session carries the upstream's own key; requests go to `url` + /v1/... `local`: what is sent to it stays on
    machines of ours.
    """

    url: str
    local: bool
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
    by: str = "user"

    def pick(self, subject: str) -> Route:
        """By a stable hash of who asks: what `Ask.subject` says of `by`."""
        hashed = hashlib.sha256(f"{self.salt}:{subject}".encode(errors="replace")).digest()
        return self.new if int.from_bytes(hashed[:8]) / 2**64 * 100 < self.percent else self.stable


@dataclass(frozen=True)
class Away:
    """Why a name that should lead somewhere does not now; `hold`: worth waiting a moment for.

    `seconds`: of an engine that comes when it is wanted: a request waits so long for it before anybody else is asked,
    and calls `want` as it begins to. `want` is no part of what two of them are compared by. `engine`: its name, for
    `Demand.header`. `patience`: so many seconds it is worth waiting for when nobody else has answered; as long as the
    gateway waits for everything else if that is longer.
    """

    reason: str
    retry_after: int = 5
    hold: bool = True
    seconds: float = 0.0
    want: Callable[[], None] | None = field(default=None, compare=False, repr=False)
    engine: str = ""
    patience: float = 0.0


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

    def knows(self, name: str) -> bool:
        return name in self.public or name in self.away

    def unknown(self, name: str, others: Iterable[str], may: Callable[[str], bool]) -> Refusal:
        """Of a name that is none, with the nearest that the caller `may` ask, `others` among them."""
        near = ", ".join(self._nearest(name, others, may))
        hint = f"; there is: {near}" if near else "; nothing is served yet"
        return Refusal(404, f"no model {name[:100]!r}{hint}", "model_not_found", param="model")

    def _nearest(self, name: str, others: Iterable[str], may: Callable[[str], bool]) -> list[str]:
        models = {each for each in self.away if "@" not in each}
        names = sorted(each for each in {*self.public, *models, *others} if may(each.partition("@")[0]))
        return difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]


class Board:
    """Holds the routes in force and counts the requests under way on each adapter.

    Each engine puts up its own part; what a caller sees is all of them, an earlier part before a later one.
    """

    def __init__(self, parts: Sequence[str] = (), demand: Demand | None = None) -> None:
        """`parts`: their order; those that are not named come behind, as they are put up."""
        self.routes = Routes()
        self.demand = demand or Demand()
        self._last_used: WeakKeyDictionary[Upstream, float] = WeakKeyDictionary()
        self.in_flight: Counter[Route] = Counter()
        self._parts: dict[str, Routes] = {name: Routes() for name in parts}
        self._changed = asyncio.Event()
        # When each version last had a request, and since when somebody waits for a name that is away (monotonic).
        self.used: dict[str, float] = {}
        self.asked: dict[str, float] = {}
        self.pokes, self._poked = 0, asyncio.Event()
        # Of versions in a canary: what was seen since it was last written down.
        self.arms: dict[str, ArmCounts] = {}

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

    def find_local(self, name: str, *, internal: bool) -> Route | Away | None:
        """As `Routes.find`, but of what leaves our machines nothing; an engine of ours that is away is, then."""
        away: Away | None = None
        for routes in self._parts.values():
            found = routes.find(name, internal=internal)
            if isinstance(found, Route) and found.engine.local:
                return found
            away = away or (found if isinstance(found, Away) else None)
        return away

    async def change(self, seconds: float) -> None:
        """Return at the next flip, or after so many seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), max(seconds, 0.0))

    def want(self, name: str) -> None:
        """Somebody waits for a name that is away; its engine's reconciler is told at once."""
        if name not in self.asked:
            self.asked[name] = time.monotonic()
            self.poke()

    def poke(self) -> None:
        """There is something to do before the next round."""
        self.pokes += 1
        poked, self._poked = self._poked, asyncio.Event()
        poked.set()

    async def poked(self, seen: int, seconds: float) -> int:
        """Return when there were more pokes than `seen`, or after so many seconds; how many there are."""
        if self.pokes == seen:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._poked.wait(), max(seconds, 0.0))
        return self.pokes

    def note(self, route: Route, seconds: float, failed: bool) -> None:
        """An answer has ended. `failed`: by the engine's fault, not by the caller's."""
        if arm := self.arms.get(route.adapter):
            arm.add(seconds, failed)

    @contextmanager
    def counted(self, route: Route) -> Iterator[None]:
        """An adapter is not unloaded while a request is inside."""
        self.in_flight[route] += 1
        self.used[route.adapter] = time.monotonic()
        try:
            yield
        finally:
            self.in_flight[route] -= 1
            self._last_used[route.engine] = time.monotonic()
            if not self.in_flight[route]:
                del self.in_flight[route]

    async def drained(self, engine: Upstream, seconds: float) -> bool:
        """Wait until nothing is under way on that engine; False if something still is after so many seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self.busy(engine):
                    await asyncio.sleep(0.05)
        return not self.busy(engine)

    def busy(self, engine: Upstream) -> bool:
        return any(route.engine is engine for route in self.in_flight)

    def last_used(self, engine: Upstream) -> float:
        """When its last request ended (time.monotonic); 0.0 before there was one."""
        return self._last_used.get(engine, 0.0)


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
