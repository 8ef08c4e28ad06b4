"""Does each route keep what its `objectives:` promise? Judged over a sliding window; news are events.

Wiring: one `Judge` in the server's event loop, given to `Metrics` (serving/metrics.py), which tells it of each request;
`Judge(broken=broken_in_log(store))` goes on where the server before it ended. `watch(judge, answering, append,
metrics.watched)` runs as a task beside it: about once a second it asks which routes can be answered, and appends an
event for each objective that was broken or is met again. `Judge.standings` is what `ft serve status` shows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from registry.errors import FtError
from registry.events import Event, new_event, newest
from registry.objectives import Objectives
from registry.store import Store
from serving.objective_window import MENDED, Window

SOURCE = "ft/serving"
BROKEN, MET = "serving.objective_broken", "serving.objective_met"
EVERY = 1.0
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Standing:
    """One objective of one route now. `value` is None where nobody asked within the window.

    `judged`: there was enough to judge by; `broken` is otherwise as it was.
    """

    route: str
    objective: str
    value: float | None
    limit: float
    window: int
    requests: int
    judged: bool
    broken: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Judge:
    """Of all routes of one gateway. `broken`: (route, objective) of those that were when it was last looked."""

    def __init__(
        self, routes: Mapping[str, Objectives], now: float = 0.0, broken: Iterable[tuple[str, str]] = ()
    ) -> None:
        self._windows: dict[str, Window] = {}
        self._broken = set(broken)
        self.change(routes, now)

    def change(self, routes: Mapping[str, Objectives], now: float) -> None:
        """Other objectives from now on. A route whose own are the same keeps its window."""
        before = self._windows
        self._windows = {
            name: before[name]
            if name in before and before[name].objectives == wanted
            else Window(wanted, now, before[name].under_way if name in before else 0)
            for name, wanted in routes.items()
        }
        self._broken = {each for each in self._broken if each[1] in self._limits(each[0])}

    def began(self, route: str, now: float) -> None:
        if window := self._windows.get(route):
            window.began(now)

    def ended(self, route: str, now: float, seconds: float, status: int) -> None:
        if window := self._windows.get(route):
            window.ended(now, seconds, status)

    def looked(self, up: Mapping[str, bool], now: float) -> None:
        """Which routes could be answered just now; those that are not named are not judged by it."""
        for name, is_up in up.items():
            if window := self._windows.get(name):
                window.looked(now, is_up)

    def standings(self, now: float) -> list[Standing]:
        """Every objective of every route; changes nothing."""
        return [
            self._standing(route, window, objective, limit, now)
            for route, window in self._windows.items()
            for objective, limit in window.objectives.limits.items()
        ]

    def turned(self, now: float) -> list[Standing]:
        """Those that broke, or were mended, since the last call; each transition is told once."""
        found = [each for each in self.standings(now) if each.broken != ((each.route, each.objective) in self._broken)]
        for each in found:
            (self._broken.add if each.broken else self._broken.discard)((each.route, each.objective))
        return found

    def _standing(self, route: str, window: Window, objective: str, limit: float, now: float) -> Standing:
        value, rests_on = window.value(objective, now)
        judged = rests_on >= _least(window.objectives, objective)
        if objective == "concurrent":  # one peak is enough to break it, and a whole window without to mend it
            judged = window.is_whole(now) or (value is not None and value > limit)
        broken = (route, objective) in self._broken
        if value is None:
            broken = broken and not window.is_whole(now)  # nobody asked for so long: it is broken for nobody
        elif judged:
            broken = _is_broken(objective, value, limit, broken)
        return Standing(
            route, objective, value, limit, window.objectives.window_seconds, rests_on, judged=judged, broken=broken
        )

    def _limits(self, route: str) -> dict[str, float]:
        window = self._windows.get(route)
        return window.objectives.limits if window else {}


async def watch(
    judge: Judge, answering: Callable[[], Mapping[str, bool]], append: Callable[[Sequence[Event]], object],
    told: Callable[[Mapping[str, bool], Sequence[Standing]], None] = lambda up, standings: None,
    gateway: str = "", every: float = EVERY,
) -> None:  # fmt: skip
    """For ever. `answering`: which routes can be answered now. `append` is called in a thread, and may fail: the
    events are then kept, and given again with the next. `told` (of the metrics) gets what was looked at and how all
    objectives stand. `gateway`: which one judges here, where there are several."""
    waiting: list[Event] = []
    while True:
        now = time.monotonic()
        up = answering()
        judge.looked(up, now)
        waiting += [event_of(each, gateway) for each in judge.turned(now)]
        told(up, judge.standings(now))
        if waiting and await _appended(append, waiting):
            waiting = []
        await asyncio.sleep(every)


def event_of(turned: Standing, gateway: str = "") -> Event:
    data = {name: getattr(turned, name) for name in ("objective", "value", "limit", "window", "requests")}
    return new_event(_source(gateway), BROKEN if turned.broken else MET, turned.route, data)


def broken_in_log(store: Store, gateway: str = "") -> set[tuple[str, str]]:
    """(route, objective) whose last event says that it is broken, so that a restart does not tell it once more."""
    all_ = [event for type_ in (BROKEN, MET) for event in newest(store, 1000, type_=type_)]
    found = [event for event in all_ if event.source == _source(gateway)]
    last = {(each.subject, str(each.data.get("objective"))): each.type for each in sorted(found, key=lambda e: e.seq)}
    return {key for key, type_ in last.items() if type_ == BROKEN}


def _source(gateway: str) -> str:
    return f"{SOURCE}/{gateway}" if gateway else SOURCE


async def _appended(append: Callable[[Sequence[Event]], object], events: list[Event]) -> bool:
    try:
        await asyncio.to_thread(append, list(events))
    except FtError as error:
        LOG.warning("objectives: the events wait: %s", error)
        return False
    return True


def _least(objectives: Objectives, objective: str) -> int:
    """Requests, or looks (about one a second), below which a value says nothing."""
    return objectives.window_seconds // 2 if objective == "availability" else objectives.requests


def _is_broken(objective: str, value: float, limit: float, was: bool) -> bool:
    """A broken one is met again a tenth inside its limit. A peak leaves the window by itself, so it needs no margin."""
    if objective == "availability":
        value, limit = 1 - value, 1 - limit
    if not was or objective == "concurrent":
        return value > limit + 1e-9
    return value > limit * MENDED + 1e-9
