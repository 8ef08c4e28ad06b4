"""What the gateway counts, for Prometheus (docs/monitoring.md lists it). One `Metrics` for each gateway process.

Wiring. Of a request, in the gateway (a whole one costs some 6 microseconds; `tests/bench/bench_metrics.py`):

    began = metrics.begin(route, key)           # names as the recipe has them, "" where there is none
    try:
        ...; began.first()                      # streams: when the first event with a token goes out
    finally:
        began.done(status, adapter, events, usage, code)

`status` is 499 where the caller went away, and 502 where a stream broke that had begun with 200. All else is a call
where it happens: `queued`, `swapped`, `started`, `fell_back`, `breaker`, `repaired`, `rated`, `answering`, `serves`.
`text` is the answer of `GET /metrics`: call it by `asyncio.to_thread`, since it takes 8 microseconds a line.

Label values are names of the recipe and of adapter versions, never a caller's words: what is not known is "other".
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from serving.objectives import Judge, Standing
from serving.request_series import NONE, OTHER, RequestSeries, Series

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BREAKERS = {"closed": 0, "half-open": 1, "open": 2}
MOST_CODES = 64
MOST_TOKENS = 1_000_000_000
GONE = 499
WAITS = (0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60)
SWAPS = (0.001, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 15, 60, 300)
STARTS = (0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a line more for each of them, which nobody reads


class Metrics:
    """`limits`: seconds of all p95 objectives; they become bounds of buckets, so that the alert on them is exact."""

    def __init__(
        self, routes: Iterable[str] = (), keys: Iterable[str] = (), limits: Iterable[float] = (),
        judge: Judge | None = None,
    ) -> None:  # fmt: skip
        self.registry, self.judge = CollectorRegistry(), judge
        ProcessCollector(registry=self.registry)
        self.requests = RequestSeries(self.registry, limits)
        self._make()
        self._under: dict[tuple[str, str], Gauge] = {}
        self._codes: set[str] = set()
        self._said: dict[Gauge, set[tuple[str, ...]]] = {}
        self.know(routes, keys)
        self._started_at.set(time.time())

    def _make(self) -> None:
        of = self.registry
        self._started_at = Gauge("ft_gateway_started_seconds", "When the gateway began (Unix time)", registry=of)
        self._under_way = Gauge("ft_requests_under_way", "Requests under way", ["route", "key"], registry=of)
        self._errors = Counter("ft_errors", "Answers that were errors", ["route", "key", "code"], registry=of)
        self._waiting = Gauge("ft_queue_waiting", "Requests that wait for an engine", ["route"], registry=of)
        self._waited = Histogram(
            "ft_queue_wait_seconds", "How long requests waited", ["route"], registry=of, buckets=WAITS
        )
        self._swap = Histogram("ft_swap_seconds", "Parts of a swap", ["route", "part"], registry=of, buckets=SWAPS)
        self._swaps = Counter("ft_swaps", "Swaps: served or refused", ["route", "outcome"], registry=of)
        self._starts = Counter("ft_on_demand_starts", "Engines started on demand", ["engine", "outcome"], registry=of)
        self._start = Histogram(
            "ft_on_demand_start_seconds", "Until it answered", ["engine"], registry=of, buckets=STARTS
        )
        self._engine_up = Gauge("ft_engine_up", "Does the engine answer (1)", ["engine"], registry=of)
        self._fallbacks = Counter("ft_fallbacks", "Requests that another answered", ["route", "upstream"], registry=of)
        self._breakers = Gauge("ft_breaker_state", "0 closed, 1 half-open, 2 open", ["upstream"], registry=of)
        self._repairs = Counter("ft_answer_repairs", "Answers asked for anew", ["route", "outcome"], registry=of)
        self._feedback = Counter("ft_feedback", "What callers said of answers", ["adapter", "rating"], registry=of)
        self._up = Gauge("ft_route_up", "Can the route be answered (1)", ["route"], registry=of)
        self._serves = Gauge("ft_route_serves", "The version behind the name (1)", ["route", "adapter"], registry=of)
        self._value = Gauge("ft_objective_value", "As judged in the gateway", ["route", "objective"], registry=of)
        self._limit = Gauge("ft_objective_limit", "What was promised", ["route", "objective"], registry=of)
        self._broken = Gauge("ft_objective_broken", "Is it broken (1)", ["route", "objective"], registry=of)
        self._lost = Counter("ft_request_log_dropped", "Lines that the request log could not keep", registry=of)

    def know(self, routes: Iterable[str], keys: Iterable[str]) -> None:
        """The names of the recipe from now on; the figures of others go."""
        self._routes, self._keys = {*routes, OTHER, NONE}, {*keys, OTHER, NONE}
        self.requests.keep(self._routes, self._keys)
        for route, key in [each for each in self._under if not (each[0] in self._routes and each[1] in self._keys)]:
            # Those under way hold on to their own, and count down where nobody looks any more.
            self._under_way.remove(route, key)
            del self._under[route, key]

    def begin(self, route: str, key: str) -> Began:
        route = route if route in self._routes else OTHER if route else NONE
        key = key if key in self._keys else OTHER if key else NONE
        under = self._under.get((route, key))
        if under is None:
            under = self._under[route, key] = self._under_way.labels(route, key)
        return Began(self, route, key, under)

    def error(self, route: str, key: str, code: str) -> None:
        """Codes are the gateway's own words, and few; the bound is for those of an upstream that come through."""
        if code not in self._codes:
            if len(self._codes) >= MOST_CODES:
                code = OTHER
            self._codes.add(code)
        self._errors.labels(route, key, code).inc()

    @contextmanager
    def queued(self, route: str) -> Iterator[None]:
        """Around the wait for an engine."""
        waiting, began = self._waiting.labels(self._name(route)), time.monotonic()
        waiting.inc()
        try:
            yield
        finally:
            waiting.dec()
            self._waited.labels(self._name(route)).observe(time.monotonic() - began)

    def swapped(self, route: str, seconds: Mapping[str, float]) -> None:
        """`seconds` by part, as `adapter.served` has them."""
        self._swaps.labels(self._name(route), "served").inc()
        for part, each in seconds.items():
            self._swap.labels(self._name(route), part).observe(each)

    def refused(self, route: str) -> None:
        """A version that was not to be served."""
        self._swaps.labels(self._name(route), "refused").inc()

    def started(self, engine: str, seconds: float, ok: bool = True) -> None:
        """An engine on demand answers, or (`ok` False) could not be started."""
        self._starts.labels(engine, "ok" if ok else "failed").inc()
        if ok:
            self._start.labels(engine).observe(seconds)

    def engine_up(self, engine: str, up: bool) -> None:
        self._engine_up.labels(engine).set(up)

    def fell_back(self, route: str, upstream: str) -> None:
        """`upstream`: the one that was asked instead."""
        self._fallbacks.labels(self._name(route), upstream).inc()

    def breaker(self, upstream: str, state: str) -> None:
        """`state` is closed, half-open or open."""
        self._breakers.labels(upstream).set(BREAKERS[state])

    def repaired(self, route: str, ok: bool) -> None:
        """An answer did not fit its schema, and was asked for once more; did that one fit?"""
        self._repairs.labels(self._name(route), "ok" if ok else "failed").inc()

    def rated(self, adapter: str, rating: float | None) -> None:
        """Of feedback, whose `adapter` must be checked to exist: it is a caller's word."""
        word = "none" if rating is None else "good" if rating > 0 else "bad"
        self._feedback.labels(adapter, word).inc()

    def answering(self, up: Mapping[str, bool]) -> None:
        """Which routes can be answered now; replaces what was said before."""
        self._replace(self._up, {(self._name(route),): float(is_up) for route, is_up in up.items()})

    def serves(self, versions: Mapping[str, str]) -> None:
        """Route -> `model@N`; replaces what was said before."""
        self._replace(self._serves, {(self._name(route), adapter): 1.0 for route, adapter in versions.items()})

    def stand(self, standings: Iterable[Standing]) -> None:
        """How the objectives stand; replaces what was said before."""
        by_name = {(each.route, each.objective): each for each in standings}
        self._replace(self._value, {name: each.value for name, each in by_name.items() if each.value is not None})
        self._replace(self._limit, {name: each.limit for name, each in by_name.items()})
        self._replace(self._broken, {name: float(each.broken) for name, each in by_name.items()})

    def watched(self, up: Mapping[str, bool], standings: Iterable[Standing]) -> None:
        """Both, as serving.objectives.watch tells them."""
        self.answering(up)
        self.stand(standings)

    def dropped(self, lines: int = 1) -> None:
        """Of the request log."""
        self._lost.inc(lines)

    def text(self) -> bytes:
        """In Prometheus' text format, whose type is CONTENT_TYPE."""
        return generate_latest(self.registry)

    def _replace(self, gauge: Gauge, values: Mapping[tuple[str, ...], float]) -> None:
        """One by one: a scrape, in its thread, would find a cleared gauge empty."""
        for labels in self._said.get(gauge, set()) - values.keys():
            gauge.remove(*labels)
        for labels, value in values.items():
            gauge.labels(*labels).set(value)
        self._said[gauge] = set(values)

    def _name(self, route: str) -> str:
        return route if route in self._routes else OTHER


class Began:
    """A request that has begun. `done` counts once, however often it is called."""

    __slots__ = ("_first", "_is_done", "_key", "_metrics", "_route", "_started", "_under")

    def __init__(self, metrics: Metrics, route: str, key: str, under: Gauge) -> None:
        self._metrics, self._route, self._key, self._under = metrics, route, key, under
        self._first, self._is_done, self._started = 0.0, False, time.monotonic()
        under.inc()
        if metrics.judge:
            metrics.judge.began(route, self._started)

    def first(self) -> None:
        """The first event with a token goes out. Later calls change nothing."""
        if not self._first:
            self._first = time.monotonic()

    def done(
        self, status: int, adapter: str = "", events: int = 0, usage: Mapping[str, Any] | None = None, code: str = ""
    ) -> None:
        """`adapter`: who made the answer. `events`: of a stream, those with tokens. `usage`: as the answer has it.
        `code`: of an error, in OpenAI's form."""
        if self._is_done:
            return
        self._is_done, now = True, time.monotonic()
        self._under.dec()
        if judge := self._metrics.judge:
            judge.ended(self._route, now, now - self._started, status)
        series = self._metrics.requests.of(self._route, adapter or NONE, self._key, now)
        if status < 400:
            self._answered(series, now, events, usage)
        else:
            self._metrics.error(self._route, self._key, code or str(status))
        series.by_status[_class(status)].inc()

    def _answered(self, series: Series, now: float, events: int, usage: Mapping[str, Any] | None) -> None:
        series.seconds.observe(now - self._started)
        tokens = 0
        if usage:
            series.prompt.inc(_tokens(usage, "prompt_tokens"))
            tokens = _tokens(usage, "completion_tokens")
            series.completion.inc(tokens)
        if self._first:
            series.first.observe(self._first - self._started)
            # An event may carry several tokens, so their own number is the better one where it is known.
            gaps = (tokens or events) - 1
            if gaps > 0:
                series.interval.observe((now - self._first) / gaps)


def _class(status: int) -> str:
    return "2xx" if status < 400 else "gone" if status == GONE else "4xx" if status < 500 else "5xx"


def _tokens(usage: Mapping[str, Any], name: str) -> int:
    """What an upstream says, which may be anything; a counter that is given less than nothing raises."""
    found = usage.get(name)
    return found if type(found) is int and 0 <= found <= MOST_TOKENS else 0
