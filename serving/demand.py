"""What requests want of engines that are off: the gateway writes it down, the server's rounds act on it.

For the gateway: a route that is `Away` with an `engine` names the one that has to be started. Whoever begins to hold a
request for it calls `want` (or the Away's own; the wish is forgotten a while after the last call), holds it for up to
`hold` seconds (the Away's `seconds`), and puts `header` into `x-ft-engine` of a 503. Each request that could go to an
engine is counted once with `count`. All of it runs in one event loop and returns at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from registry.durations import seconds
from registry.serve_recipe import EngineTerms
from serving.rules import LONGEST_LOOKED_AT, plain

# Beyond the time for which its request was held: a caller who was told to come again is waited for this long.
REMEMBERED_SECONDS = 60.0
# Of an engine that has never been started here.
GUESSED_START_SECONDS = 90.0


@dataclass
class _Wish:
    since: float
    last: float


@dataclass
class _Story:
    """What is told of an engine that is not up: `eta` is when it will be, as far as that can be known."""

    what: str = "off"
    began: float = 0.0
    eta: float | None = None


@dataclass
class Demand:
    """`engines`: those of the serve recipe by name; `now` is a monotonic clock in seconds."""

    engines: Mapping[str, EngineTerms] = field(default_factory=dict)
    now: Callable[[], float] = time.monotonic
    start_seconds: dict[str, float] = field(default_factory=dict)
    _wishes: dict[str, _Wish] = field(default_factory=dict)
    _counted: dict[str, deque[float]] = field(default_factory=dict)
    _stories: dict[str, _Story] = field(default_factory=dict)

    def want(self, engine: str) -> None:
        """Have it started, if it is one that starts on demand and is not up."""
        terms = self.engines.get(engine)
        if terms is not None and terms.start == "demand":
            now = self.now()
            self.wanted_since(engine)  # forgets a wish that is too old
            self._wishes.setdefault(engine, _Wish(now, now)).last = now

    def count(self, engine: str, text: str) -> None:
        """A request that could go there, with its last user message: what an engine's `volume` is about."""
        terms = self.engines.get(engine)
        if terms is None or terms.volume is None or not _has_word(text, terms.volume.keywords):
            return
        now, came = self.now(), self._counted.setdefault(engine, deque(maxlen=terms.volume.requests))
        came.append(now)
        if len(came) == terms.volume.requests and now - came[0] <= seconds(terms.volume.within):
            self.want(engine)

    def hold(self, engine: str) -> float:
        """How many seconds a request may wait for it."""
        terms = self.engines.get(engine)
        return float(seconds(terms.hold)) if terms else 0.0

    def progress(self, engine: str) -> str:
        """For people: `starting, 40 %, about 20 s left`."""
        story, now = self._stories.get(engine, _Story()), self.now()
        if story.eta is None:
            return story.what
        part = min(99, round(100 * (now - story.began) / max(0.001, story.eta - story.began)))
        return f"{story.what}, {part} %, about {self.seconds_left(engine)} s left"

    def seconds_left(self, engine: str) -> int:
        """Until it is up, as far as that can be known; 0 where it cannot."""
        eta = self._stories.get(engine, _Story()).eta
        return 0 if eta is None else max(1, round(eta - self.now()))

    def header(self, engine: str) -> str:
        """The value of `x-ft-engine`: `starting; eta=20`."""
        story = self._stories.get(engine, _Story())
        return story.what if story.eta is None else f"{story.what}; eta={self.seconds_left(engine)}"

    # What follows is for the server's rounds.

    def wanted_since(self, engine: str) -> float | None:
        """Since when somebody waits for it; None where nobody does."""
        wish = self._wishes.get(engine)
        if wish is not None and self.now() - wish.last > self.hold(engine) + REMEMBERED_SECONDS:
            del self._wishes[engine]
            return None
        return wish.since if wish else None

    def starts(self, engine: str) -> None:
        began = self.now()
        took = self.start_seconds.get(engine, GUESSED_START_SECONDS)
        self._stories[engine] = _Story("starting", began, began + took)

    def waits(self, engine: str, until: float) -> None:
        """Until another engine may be stopped for it; then it has to start."""
        story = self._stories.get(engine)
        began = story.began if story and story.what == "waiting for its turn" else self.now()
        took = self.start_seconds.get(engine, GUESSED_START_SECONDS)
        self._stories[engine] = _Story("waiting for its turn", began, until + took)

    def is_up(self, engine: str, took: float | None = None) -> None:
        """It answers. `took`: the seconds of its start, where it was one."""
        self._wishes.pop(engine, None)
        self._stories[engine] = _Story("up")
        if took is not None:
            self.start_seconds[engine] = round(took, 1)

    def is_off(self, engine: str, what: str = "off") -> None:
        self._stories[engine] = _Story(what)


def _has_word(text: str, words: list[str]) -> bool:
    if not words:
        return True
    found = plain(text[:LONGEST_LOOKED_AT])
    return any(plain(word) in found for word in words)
