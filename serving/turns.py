"""Which engines of one card are up: those that always are, and those on demand, which take turns where they do not fit.

Pure. The oldest waiter is served first, and nobody is let in before it that would take its room. An engine that came
up stays for its residence, so two that are both wanted change places once in that time at most, and the requests that
came meanwhile are answered together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Place = Literal["off", "asleep", "coming", "up", "going"]


@dataclass(frozen=True)
class Stand:
    """One engine. `needs` and `rests` are bytes of the card while it is on and when it is not: 0 unless it sleeps then.

    `since` is when its place began, `used` when its last request ended, `wanted` since when somebody waits for it (all
    on one clock, in seconds). `busy`: requests are under way on it.
    """

    name: str
    place: Place
    needs: int
    since: float = 0.0
    used: float = 0.0
    wanted: float | None = None
    busy: bool = False
    always: bool = False
    residence: float = 120.0
    idle: float = 900.0
    rests: int = 0

    @property
    def holds(self) -> int:
        return {"off": 0, "asleep": self.rests}.get(self.place, self.needs)

    @property
    def free_from(self) -> float:
        """From when on it may be stopped for another."""
        return self.since + self.residence


@dataclass(frozen=True)
class Turns:
    """What to do now. `evict`: sleepers that have to end whole. `waits`: until when the waiting ones wait at least."""

    start: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    evict: tuple[str, ...] = ()
    waits: dict[str, float] = field(default_factory=dict)


def decide(stands: Sequence[Stand], room: int, now: float) -> Turns:
    """For the engines of one card with `room` bytes for them."""
    waiting = sorted(
        (each for each in stands if each.place in ("off", "asleep") and (each.always or each.wanted is not None)),
        key=lambda each: (not each.always, each.wanted or 0.0),
    )
    idle = [each.name for each in stands if _is_idle(each, now)]
    if not waiting:
        return Turns(stop=tuple(idle))
    started: list[str] = []
    left = room - sum(each.holds for each in stands)
    for place, first in enumerate(waiting):
        needed = first.needs - first.holds
        if needed > left:
            return _make_room(stands, waiting[place:], needed - left, now, tuple(started), tuple(idle))
        started.append(first.name)
        left -= needed
    return Turns(start=tuple(started), stop=tuple(idle))


def _make_room(
    stands: Sequence[Stand],
    waiting: Sequence[Stand],
    lacking: int,
    now: float,
    started: tuple[str, ...],
    idle: tuple[str, ...],
) -> Turns:
    """For the first of those that wait; the others come after it."""
    first = waiting[0]
    lacking -= sum(each.needs - each.rests for each in stands if each.place == "going" or each.name in idle)
    sleepers = [each for each in stands if each.place == "asleep" and each is not first]
    evicted, lacking = _enough(sleepers, lacking, {each.name: each.rests for each in sleepers})
    candidates = sorted(
        (each for each in stands if each.place == "up" and not each.always and each.name not in idle),
        key=lambda each: (each.free_from > now, each.busy, each.used),
    )
    chosen, _ = _enough(candidates, lacking, {each.name: each.needs - each.rests for each in candidates})
    until = max([now, *(each.free_from for each in chosen)])
    stopped = tuple(each.name for each in chosen) if until <= now else ()
    return Turns(started, (*idle, *stopped), tuple(each.name for each in evicted), _waits(waiting, until))


def _enough(candidates: Sequence[Stand], lacking: int, gives: dict[str, int]) -> tuple[list[Stand], int]:
    chosen = []
    for each in candidates:
        if lacking > 0 and gives[each.name] > 0:
            chosen.append(each)
            lacking -= gives[each.name]
    return chosen, lacking


def _waits(waiting: Sequence[Stand], until: float) -> dict[str, float]:
    found = {}
    for each in waiting:
        found[each.name] = until
        until += each.residence
    return found


def _is_idle(stand: Stand, now: float) -> bool:
    quiet = not stand.busy and not stand.always and stand.wanted is None
    return stand.place == "up" and quiet and now - max(stand.since, stand.used) >= stand.idle
