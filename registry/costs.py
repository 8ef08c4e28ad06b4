"""What was spent, added up for people, and what a month will have cost if things go on as they do. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from registry.budgets import RentedPod, end_of, period_of, start_of

By = Literal["run", "recipe", "month"]
DAY = 86400.0
# A trend over less than this would take one busy day for the habit of a month.
LEAST_DAYS, TREND_DAYS = 7.0, 30.0
NOT_KNOWN = "(not in the ledger)"


@dataclass(frozen=True)
class Line:
    """US dollars; of `usd`, `measured_usd` is not on a final bill yet. `seconds` are of pods: endpoints are billed for
    less than they are there."""

    name: str
    pods: int
    endpoints: int
    seconds: float
    usd: float
    measured_usd: float


@dataclass(frozen=True)
class Forecast:
    """Of one month, US dollars: spent up to now, running pods until their permits end, endpoints' workers that are kept
    awake, and the trend of 30 days."""

    month: str
    spent_usd: float
    running_usd: float
    trend_usd_per_day: float
    days_left: float
    awake_usd: float = 0.0

    @property
    def usd(self) -> float:
        return self.spent_usd + self.running_usd + self.awake_usd + self.trend_usd_per_day * self.days_left


def lines(pods: Iterable[RentedPod], by: By, now: float) -> list[Line]:
    """One for each run, recipe or month, the dearest first; months in their order."""
    found: dict[str, list[tuple[RentedPod, float, float]]] = {}
    for pod in pods:
        for name, usd, seconds in _parts(pod, by, now):
            found.setdefault(name, []).append((pod, usd, seconds))
    added = [_line(name, parts) for name, parts in found.items()]
    return sorted(added, key=lambda each: each.name if by == "month" else (-each.usd, each.name))


def forecast(
    pods: Iterable[RentedPod], running_usd: float, now: float, awake: Collection[tuple[str, float]] = ()
) -> Forecast:
    """What the month will have cost. `running_usd` is what open rentals will still take; `awake` are the ids of
    endpoints that always have workers, with what those cost an hour: they are no habit, they go on."""
    pods, ids = list(pods), {id_ for id_, _ in awake}
    first = min((each.created for each in pods), default=now)
    days = min(TREND_DAYS, max(LEAST_DAYS, (now - first) / DAY))
    lately = sum(each.usd_between(now - days * DAY, now, now) for each in pods if each.pod not in ids)
    spent = sum(each.usd_between(start_of("month", now), now, now) for each in pods)
    left = (end_of("month", now) - now) / DAY
    kept = sum(usd for _, usd in awake) * 24 * left
    return Forecast(period_of("month", now), spent, running_usd, lately / days, left, kept)


def _parts(pod: RentedPod, by: By, now: float) -> Iterator[tuple[str, float, float]]:
    """Under which names the pod counts, with how many dollars and seconds."""
    if by != "month":
        yield (pod.job if by == "run" else pod.recipe) or NOT_KNOWN, pod.usd(now), pod.seconds(now)
        return
    month, last = start_of("month", pod.created), now if pod.ended is None else pod.ended
    while month <= max(last, pod.created):
        end = end_of("month", month)
        seconds = max(0.0, min(end, last) - max(month, pod.created))
        yield period_of("month", month), pod.usd_between(month, end, now), seconds
        month = end


def _line(name: str, parts: list[tuple[RentedPod, float, float]]) -> Line:
    measured = sum(usd for pod, usd, _ in parts if not pod.final)
    seconds = sum(seconds for pod, _, seconds in parts if pod.kind == "pod")
    number = {kind: sum(pod.kind == kind for pod, _, _ in parts) for kind in ("pod", "endpoint")}
    usd = sum(usd for _, usd, _ in parts)
    return Line(name, number["pod"], number["endpoint"], seconds, usd, measured)
