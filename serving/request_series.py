"""The figures of requests by route, adapter version and key: so many of them at most, and each found quickly."""

from __future__ import annotations

from collections.abc import Container, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram

OTHER, NONE = "other", "none"
LABELS = ["route", "adapter", "key"]
# Each is some 45 lines of text. Versions come for ever; what was longest not asked makes room.
MOST_SERIES = 300
CLASSES = ("2xx", "4xx", "5xx", "gone")
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120)
FIRST = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 1, 2, 5, 10, 30, 60)
BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1)


class Series:
    """Of one route, version and key. All classes of status are there from the beginning: Prometheus takes a counter's
    first value for where it began, and would not see the first errors."""

    __slots__ = ("by_status", "completion", "first", "interval", "last", "prompt", "seconds")

    def __init__(self, all_: RequestSeries, names: tuple[str, str, str]) -> None:
        self.last = 0.0
        self.by_status = {each: all_.count.labels(*names, each) for each in CLASSES}
        self.prompt, self.completion = all_.prompt.labels(*names), all_.completion.labels(*names)
        self.seconds, self.first = all_.seconds.labels(*names), all_.first.labels(*names)
        self.interval = all_.interval.labels(*names)


class RequestSeries:
    """Found by their names in a dictionary: asking prometheus-client for a label's child costs 2 microseconds each."""

    def __init__(self, registry: CollectorRegistry, limits: Iterable[float], most: int = MOST_SERIES) -> None:
        self._most = most
        whole = tuple(sorted({*map(float, WHOLE), *map(float, limits)}))
        self.count = Counter("ft_requests", "Requests that ended", [*LABELS, "status"], registry=registry)
        self.prompt = Counter("ft_prompt_tokens", "Tokens of prompts", LABELS, registry=registry)
        self.completion = Counter("ft_completion_tokens", "Tokens of answers", LABELS, registry=registry)
        self.seconds = Histogram(
            "ft_request_seconds", "Until an answer was complete (status 2xx)", LABELS, registry=registry, buckets=whole
        )
        self.first = Histogram(
            "ft_first_token_seconds", "Until the first token (streams)", LABELS, registry=registry, buckets=FIRST
        )
        self.interval = Histogram(
            "ft_token_interval_seconds", "Mean time between tokens of a stream", LABELS, registry=registry,
            buckets=BETWEEN,
        )  # fmt: skip
        self._found: dict[tuple[str, str, str], Series] = {}

    def of(self, route: str, adapter: str, key: str, now: float) -> Series:
        names = (route, adapter, key)
        found = self._found.get(names)
        if found is None:
            if len(self._found) >= self._most:
                self._drop(min(self._found, key=lambda each: self._found[each].last))
            found = self._found[names] = Series(self, names)
        found.last = now
        return found

    def keep(self, routes: Container[str], keys: Container[str]) -> None:
        """Only those of these names."""
        for names in [each for each in self._found if not (each[0] in routes and each[2] in keys)]:
            self._drop(names)

    def _drop(self, names: tuple[str, str, str]) -> None:
        del self._found[names]
        for metric in (self.prompt, self.completion, self.seconds, self.first, self.interval):
            metric.remove(*names)
        for each in CLASSES:
            self.count.remove(*names, each)
