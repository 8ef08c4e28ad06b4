"""What happened on one route in the last so many seconds, in memory that does not grow with traffic.

A ring of slots of a sixtieth of the window each; what leaves the ring is taken off the totals, so a look costs the same
however much was asked. Times to answer are counted in buckets a tenth apart, with the limit and a tenth below it as
bounds: "beyond the limit" and "mended" are exact, and only the figure that is shown is up to a tenth too high. A sample
of the requests would be as small, but would judge the same traffic differently from time to time.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from math import ceil

from registry.objectives import LONGEST, Objectives

SLOTS = 60
GRID = tuple(0.001 * 1.1**step for step in range(200) if 0.001 * 1.1**step < LONGEST)
MENDED = 0.9  # of the limit: a route that hovers at it would break and mend with every look


@dataclass(slots=True)
class Slot:
    """A sixtieth of the window. `times`: bucket -> answers; `up` of `looks`: the route could be answered."""

    times: dict[int, int] = field(default_factory=dict)
    answers: int = 0
    errors: int = 0
    up: int = 0
    looks: int = 0
    peak: int = 0


class Window:
    """Of one route. `now` is monotonic and in seconds, and never goes back; used from one thread."""

    def __init__(self, objectives: Objectives, now: float, under_way: int = 0) -> None:
        self.objectives, self.under_way, self._since = objectives, under_way, now
        limit = objectives.limits.get("p95")
        self._bounds = tuple(sorted({*GRID, LONGEST, *((limit, limit * MENDED) if limit else ())}))
        self._width = objectives.window_seconds / SLOTS
        self._number = int(now / self._width)
        self._ring = [Slot() for _ in range(SLOTS)]
        self._slot = self._ring[self._number % SLOTS]
        self._slot.peak = under_way
        self._times = [0] * (len(self._bounds) + 1)
        self._answers = self._errors = self._up = self._looks = 0

    def began(self, now: float) -> None:
        slot = self._roll(now)
        self.under_way += 1
        slot.peak = max(slot.peak, self.under_way)

    def ended(self, now: float, seconds: float, status: int) -> None:
        """What the caller did wrong, or gave up, says nothing of the route, and a quick error is no quick answer."""
        slot = self._roll(now)
        self.under_way = max(self.under_way - 1, 0)  # it may have begun before the route had objectives
        if status < 400:
            bucket = bisect_left(self._bounds, seconds)
            slot.times[bucket] = slot.times.get(bucket, 0) + 1
            slot.answers += 1
            self._times[bucket] += 1
            self._answers += 1
        elif status >= 500:
            slot.errors += 1
            self._errors += 1

    def looked(self, now: float, up: bool) -> None:
        """Could the route be answered when somebody looked? To be told about once a second."""
        slot = self._roll(now)
        slot.looks, slot.up = slot.looks + 1, slot.up + up
        self._looks, self._up = self._looks + 1, self._up + up

    def is_whole(self, now: float) -> bool:
        """Has it been watched for all its length? Until then, that nothing was seen says nothing."""
        return now - self._since >= self.objectives.window_seconds

    def value(self, objective: str, now: float) -> tuple[float | None, int]:
        """The value in the window, and the requests or looks that it rests on; None where there were none."""
        self._roll(now)
        if objective == "p95":
            return self._p95() if self._answers else None, self._answers
        if objective == "error_rate":
            asked = self._answers + self._errors
            return self._errors / asked if asked else None, asked
        if objective == "availability":
            return self._up / self._looks if self._looks else None, self._looks
        return float(max(slot.peak for slot in self._ring)), self._answers + self._errors

    def _p95(self) -> float:
        need, within = ceil(0.95 * self._answers - 1e-9), 0
        for bucket, count in enumerate(self._times):
            within += count
            if within >= need:
                return float(self._bounds[min(bucket, len(self._bounds) - 1)])
        return float(LONGEST)

    def _roll(self, now: float) -> Slot:
        number = int(now / self._width)
        if number != self._number:
            for old in range(max(self._number + 1, number - SLOTS + 1), number + 1):
                self._empty(old % SLOTS)
            self._number = number
            self._slot = self._ring[number % SLOTS]
        return self._slot

    def _empty(self, place: int) -> None:
        slot = self._ring[place]
        for bucket, count in slot.times.items():
            self._times[bucket] -= count
        self._answers, self._errors = self._answers - slot.answers, self._errors - slot.errors
        self._up, self._looks = self._up - slot.up, self._looks - slot.looks
        self._ring[place] = Slot(peak=self.under_way)
